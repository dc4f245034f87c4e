// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package pkcs11_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/testkit"
	"klatch/internal/testkit/softhsm"
	"klatch/internal/token/pkcs11"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

func TestKeysInAToken(t *testing.T) {
	h := softhsm.New(t)
	made, err := pkcs11.Make(h.Module, h.Token, "root", h.PIN, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := pkcs11.Open(h.Module, h.Token, "root", h.PIN)
	if err != nil {
		t.Fatal(err)
	}
	if !made.(*ecdsa.PublicKey).Equal(s.Public()) {
		t.Error("another key came back")
	}
	sum := sha256.Sum256([]byte("text"))
	sig, err := s.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(made.(*ecdsa.PublicKey), sum[:], sig) {
		t.Errorf("signature: %v", err)
	}
	module, err := pkcs11.Make(h.Module, h.Token, "module", h.PIN, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = pkcs11.Open(h.Module, h.Token, "module", h.PIN); err != nil {
		t.Fatal(err)
	}
	if sig, err = s.Sign(rand.Reader, sum[:], crypto.SHA256); err != nil || rsa.VerifyPKCS1v15(module.(*rsa.PublicKey), crypto.SHA256, sum[:], sig) != nil {
		t.Errorf("RSA signature: %v", err)
	}
	for name, open := range map[string]func() error{
		"no such key":   func() error { _, err := pkcs11.Open(h.Module, h.Token, "other", h.PIN); return err },
		"no such token": func() error { _, err := pkcs11.Open(h.Module, "other", "root", h.PIN); return err },
		"no library":    func() error { _, err := pkcs11.Open("/nonexistent.so", h.Token, "root", h.PIN); return err },
	} {
		if err := open(); fault.CodeOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// again runs a test in a process of its own: a PKCS#11 library reads its
// settings, and so which tokens there are, once in a process.
func again(t *testing.T) bool {
	t.Helper()
	const child = "KLATCH_TEST_CHILD"
	if os.Getenv(child) != "" {
		return false
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), child+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return true
}

// TestOpenSSLVerifiesModuleSignatures: ten signatures by a key in a file, ten
// by a key in a token, and of each a copy that was tampered with.
func TestOpenSSLVerifiesModuleSignatures(t *testing.T) {
	testkit.Need(t, "openssl", "softhsm")
	if again(t) {
		return
	}
	h := softhsm.New(t)
	if _, err := pkcs11.Make(h.Module, h.Token, "module", h.PIN, 4096); err != nil {
		t.Fatal(err)
	}
	inToken, err := pkcs11.Open(h.Module, h.Token, "module", h.PIN)
	if err != nil {
		t.Fatal(err)
	}
	inFile, err := rsa.GenerateKey(rand.Reader, 4096)
	if err != nil {
		t.Fatal(err)
	}
	good, bad := 0, 0
	for name, signer := range map[string]crypto.Signer{"a file": inFile, "a token": inToken} {
		k, cert := certificate(t, signer)
		for i := range 10 {
			module := make([]byte, 1000+i)
			if _, err := rand.Read(module); err != nil {
				t.Fatal(err)
			}
			whole, err := trustsign.Module(module, k, signer, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			a := trust.Anchor{ModuleKeys: []trust.ModuleKey{k}}
			if _, err := a.VerifyModule(whole); err != nil {
				t.Errorf("%s, module %d: %v", name, i, err)
			}
			cms := whole[len(module) : len(whole)-len(trust.ModuleMarker)-12]
			if err := openssl(t, module, cms, cert); err != nil {
				t.Errorf("%s, module %d: %v", name, i, err)
			} else {
				good++
			}
			if i%2 == 0 { // half of them in the module, half in the signature
				module[i*90] ^= 1
			} else {
				cms[len(cms)-1-i*40] ^= 1
			}
			if err := openssl(t, module, cms, cert); err == nil {
				t.Errorf("%s, module %d: OpenSSL takes what was tampered with", name, i)
			} else {
				bad++
			}
		}
	}
	if good != 20 || bad != 20 {
		t.Errorf("%d good ones verify, %d tampered ones do not; want 20 and 20", good, bad)
	}
}

// certificate makes a module key's certificate, signed by itself, in PEM.
func certificate(t *testing.T, key crypto.Signer) (trust.ModuleKey, []byte) {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(4711), Subject: pkix.Name{CommonName: "klatch test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pub, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		t.Fatalf("a %T", key.Public())
	}
	return trust.ModuleKey{Name: "test", Issuer: parsed.RawIssuer, Serial: []byte{2, 2, 0x12, 0x67}, Modulus: pub.N.Bytes(), Exponent: pub.E},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func openssl(t *testing.T, module, cms, cert []byte) error {
	t.Helper()
	dir := t.TempDir()
	for name, b := range map[string][]byte{"module": module, "cms": cms, "cert": cert} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", "cms", "-content", "module", "-certfile", "cert", "-noverify", "-out", "/dev/null")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
