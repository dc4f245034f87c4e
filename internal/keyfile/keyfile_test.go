// SPDX-License-Identifier: Apache-2.0

package keyfile_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/keyfile"
)

func write(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProtectedKeySignsAfterItsPassphrase(t *testing.T) {
	content, err := keyfile.NewECDSA()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := keyfile.PublicOf(content)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := keyfile.Protect(content, []byte("correct horse"), pub)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, content[30:60]) {
		t.Error("the key is readable in the protected file")
	}
	path := write(t, "a.key", sealed)
	if is, err := keyfile.Protected(path); err != nil || !is {
		t.Errorf("protected %v, %v", is, err)
	}

	// The public half needs no passphrase; signing does.
	t.Setenv(keyfile.PassphraseEnv, write(t, "wrong", []byte("wrong horse\n")))
	s, err := keyfile.Open(path)
	if err != nil || !s.Public().(*ecdsa.PublicKey).Equal(pub) {
		t.Fatalf("public half: %v", err)
	}
	sum := sha256.Sum256([]byte("text"))
	if _, err := s.Sign(rand.Reader, sum[:], crypto.SHA256); fault.CodeOf(err) != "wrong_passphrase" {
		t.Errorf("with a wrong passphrase: %v", err)
	}
	t.Setenv(keyfile.PassphraseEnv, write(t, "right", []byte("correct horse\nand a second line")))
	sig, err := s.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), sum[:], sig) {
		t.Errorf("with the passphrase: %v", err)
	}
	if b, err := keyfile.Content(path); err != nil || !bytes.Equal(b, content) {
		t.Errorf("content: %v", err)
	}
}

func TestKeyFilesThatAreRefused(t *testing.T) {
	content, err := keyfile.NewECDSA()
	if err != nil {
		t.Fatal(err)
	}
	other, err := keyfile.NewECDSA()
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := keyfile.PublicOf(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyfile.Protect(content, []byte("short"), wrong); fault.CodeOf(err) != "short_passphrase" {
		t.Errorf("a short passphrase: %v", err)
	}
	swapped, err := keyfile.Protect(content, []byte("correct horse"), wrong)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyfile.Protect(swapped, []byte("correct horse"), wrong); fault.CodeOf(err) != "protected" {
		t.Errorf("twice: %v", err)
	}
	t.Setenv(keyfile.PassphraseEnv, write(t, "right", []byte("correct horse")))
	s, err := keyfile.Open(write(t, "swapped.key", swapped))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); fault.CodeOf(err) != "bad_key" {
		t.Errorf("another public half in the header: %v", err)
	}
	torn := bytes.Replace(swapped, []byte("\n\n"), []byte("\n\nAAAA"), 1)
	for name, tt := range map[string]struct {
		content []byte
		want    fault.Code
	}{
		"no PEM":                            {[]byte("key"), "bad_key"},
		"no key inside":                     {[]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "bad_key"},
		"protected without a header":        {[]byte("-----BEGIN KLATCH ENCRYPTED FILE-----\nAAAA\n-----END KLATCH ENCRYPTED FILE-----\n"), "bad_key"},
		"torn":                              {torn, "bad_key"},
		"a token without its library":       {[]byte("pkcs11:token=a;object=b?pin-source=file:/x"), "bad_token_uri"},
		"a token with its PIN inside":       {[]byte("pkcs11:token=a;object=b?module-path=/x&pin-value=1234"), "bad_token_uri"},
		"a token with an unknown attribute": {[]byte("pkcs11:token=a;object=b;id=%01?module-path=/x&pin-source=file:/x"), "bad_token_uri"},
	} {
		s, err := keyfile.Open(write(t, "x.key", tt.content))
		if err == nil {
			_, err = s.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		}
		if code := fault.CodeOf(err); code != tt.want && (name != "torn" || code != "wrong_passphrase") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := keyfile.Open(filepath.Join(t.TempDir(), "none.key")); fault.CodeOf(err) != "no_key" {
		t.Errorf("no file: %v", err)
	}
}
