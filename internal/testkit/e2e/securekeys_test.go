// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/testkit"
	"klatch/internal/trust"
)

// securePublisher has a certificate for its module key, as firmware wants it,
// and one for a key of a kind that we never use.
type securePublisher struct {
	*publisher
	cert, ecdsaCert []byte // in DER
	parsed          *x509.Certificate
	ecdsa           *ecdsa.PrivateKey
}

func newSecurePublisher(t *testing.T, name string, m made) *securePublisher {
	t.Helper()
	p := &securePublisher{publisher: newPublisher(t, name, m)}
	var err error
	if p.Module, err = rsa.GenerateKey(rand.Reader, 4096); err != nil {
		t.Fatal(err)
	}
	if p.ecdsa, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	p.cert, p.ecdsaCert = certificate(t, name, 4711, p.Module), certificate(t, name+" on a curve", 4712, p.ecdsa)
	if p.parsed, err = x509.ParseCertificate(p.cert); err != nil {
		t.Fatal(err)
	}
	serial, err := asn1.Marshal(p.parsed.SerialNumber)
	if err != nil {
		t.Fatal(err)
	}
	p.Anchor.ModuleKeys[0] = trust.ModuleKey{Name: name, Issuer: p.parsed.RawIssuer, Serial: serial, Modulus: p.Module.N.Bytes(), Exponent: p.Module.E}
	return p
}

func certificate(t *testing.T, name string, serial int64, key crypto.Signer) []byte {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "Klatch test key of " + name},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, // as package sign makes it
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// signFile signs with the kernel's own program.
func (p *securePublisher) signFile(raw []byte, digest string, key crypto.Signer, cert []byte) []byte {
	p.t.Helper()
	dir := p.files(raw, key, cert)
	p.program(dir, testkit.SignFile(), digest, "key.pem", "cert.pem", "module.ko")
	b, err := os.ReadFile(filepath.Join(dir, "module.ko"))
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// lenient is a good signature in the form of a common CMS library for Go: the
// certificate is inside, and the algorithm is named with its digest
// (sha256WithRSAEncryption) where the kernel wants rsaEncryption alone.
func (p *securePublisher) lenient(raw []byte) []byte {
	p.t.Helper()
	dir := p.files(raw, p.Module, p.cert)
	p.program(dir, "openssl", "cms", "-sign", "-binary", "-noattr", "-md", "sha256", "-signer", "cert.pem", "-inkey", "key.pem", "-in", "module.ko",
		"-outform", "DER", "-out", "cms")
	cms, err := os.ReadFile(filepath.Join(dir, "cms"))
	if err != nil {
		p.t.Fatal(err)
	}
	plain := []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01}
	at := bytes.LastIndex(cms, plain) // the one before is the certificate's
	if at < 0 || !bytes.Contains(cms, p.cert) {
		p.t.Fatal("not the form that was wanted")
	}
	cms[at+len(plain)-1] = 0x0b
	out := append(bytes.Clone(raw), cms...)
	out = append(out, 0, 0, 2, 0, 0, 0, 0, 0)
	out = binary.BigEndian.AppendUint32(out, uint32(len(cms)))
	return append(out, trust.ModuleMarker...)
}

func (p *securePublisher) program(dir string, argv ...string) {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), argv[0], argv[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}

// files is a folder with what such programs want.
func (p *securePublisher) files(raw []byte, key crypto.Signer, cert []byte) string {
	p.t.Helper()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	dir := p.t.TempDir()
	for name, b := range map[string][]byte{
		"key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), "module.ko": raw,
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	return dir
}
