// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"testing"
	"time"

	"klatch/internal/wire"
)

// FuzzParseRequest: what a stranger sends to enroll. A request that is taken
// has a P-256 key, and the certificate for it says nothing that the request
// asked for.
func FuzzParseRequest(f *testing.F) {
	_, csr, err := NewMachineKey()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(csr)
	f.Add(csr[:len(csr)-1])
	f.Add([]byte{0x30, 0x80, 0, 0})
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	ca, err := NewCA("fuzz", now)
	if err != nil {
		f.Fatal(err)
	}
	const id = "mch_01hzzzzzzzzzzzzzzzzzzzzzzz"
	f.Fuzz(func(t *testing.T, der []byte) {
		r, err := ParseRequest(der)
		if err != nil {
			return
		}
		out, _, err := ca.SignMachine(r, id, now)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(out)
		if err != nil {
			t.Fatal(err)
		}
		key, ok := c.PublicKey.(*ecdsa.PublicKey)
		if !ok || key.Curve != elliptic.P256() || c.Subject.CommonName != id || c.IsCA || len(c.DNSNames)+len(c.IPAddresses)+len(c.URIs)+len(c.EmailAddresses) != 0 {
			t.Errorf("signed %+v", c.Subject)
		}
	})
}

// FuzzParseToken: the word that an operator types. Whatever it is, a token
// that is taken is spelled in one way.
func FuzzParseToken(f *testing.F) {
	s, err := NewSecret()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(s.Token(Fingerprint{1})))
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		secret, ca, err := ParseToken(wire.Token(text))
		if err != nil {
			return
		}
		if again := secret.Token(ca); string(again) != text {
			t.Errorf("%q is also spelled %q", text, again)
		}
	})
}

// FuzzLoadCA: files of a data folder that somebody changed are an error.
func FuzzLoadCA(f *testing.F) {
	ca, err := NewCA("fuzz", time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC))
	if err != nil {
		f.Fatal(err)
	}
	cert, key, err := ca.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert, key)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE"}), key)
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		if c, err := LoadCA(cert, key); err == nil && !c.cert.IsCA {
			t.Error("a CA that is none")
		}
	})
}
