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
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	dir := p.t.TempDir()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			p.t.Fatal(err)
		}
		return path
	}
	module := write("module.ko", raw)
	if out, err := exec.CommandContext(p.t.Context(), testkit.SignFile(), digest,
		write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})),
		write("cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})), module).CombinedOutput(); err != nil {
		p.t.Fatalf("sign-file: %v\n%s", err, out)
	}
	b, err := os.ReadFile(module)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// lenient is a good signature in the form of a common CMS library: the
// algorithm is named with its digest (sha256WithRSAEncryption) where the kernel
// wants rsaEncryption alone.
func lenient(p *securePublisher, raw []byte) []byte {
	p.t.Helper()
	digest := sha256.Sum256(raw)
	sig, err := rsa.SignPKCS1v15(rand.Reader, p.Module, crypto.SHA256, digest[:])
	if err != nil {
		p.t.Fatal(err)
	}
	plain := []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01}
	with := slices.Clone(plain)
	with[10] = 0x0b
	cms := p.Anchor.ModuleKeys[0].CMS(sig)
	if bytes.Count(cms, plain) != 1 {
		p.t.Fatal("no algorithm to change")
	}
	cms = bytes.Replace(cms, plain, with, 1)
	out := append(bytes.Clone(raw), cms...)
	out = append(out, 0, 0, 2, 0, 0, 0, 0, 0)
	out = binary.BigEndian.AppendUint32(out, uint32(len(cms)))
	return append(out, trust.ModuleMarker...)
}
