// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package pkcs11_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/testkit/softhsm"
	"klatch/internal/token/pkcs11"
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
