// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"klatch/internal/fault"
)

// TestVerifyMachineLooksAtEachPart: certificates of our own CA that name no
// machine, or not now, or are for something else.
func TestVerifyMachineLooksAtEachPart(t *testing.T) {
	now := time.Now()
	ca, err := NewCA("test", now)
	if err != nil {
		t.Fatal(err)
	}
	const id = "mch_01jd0000000000000000000000"
	for _, c := range []struct {
		name, subject string
		usage         x509.ExtKeyUsage
		at            time.Duration
		code          fault.Code
	}{
		{"good", id, x509.ExtKeyUsageClientAuth, 0, ""},
		{"good to the end", id, x509.ExtKeyUsageClientAuth, MachineLife - time.Minute, ""},
		{"expired", id, x509.ExtKeyUsageClientAuth, MachineLife + time.Minute, "certificate_expired"},
		{"not valid yet", id, x509.ExtKeyUsageClientAuth, -early - time.Minute, "certificate_expired"},
		{"a server's", id, x509.ExtKeyUsageServerAuth, 0, "certificate_unknown"},
		{"no machine's name", "klatch.example.org", x509.ExtKeyUsageClientAuth, 0, "certificate_unknown"},
		{"more than a machine's name", id + "/x", x509.ExtKeyUsageClientAuth, 0, "certificate_unknown"},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		form, err := template(c.subject, now, MachineLife)
		if err != nil {
			t.Fatal(err)
		}
		form.ExtKeyUsage = []x509.ExtKeyUsage{c.usage}
		cert, err := issue(form, ca.cert, &key.PublicKey, ca.key)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ca.VerifyMachine(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}, now.Add(c.at))
		if fault.CodeOf(err) != c.code || (err == nil) != (c.code == "") || (err == nil) != (got == id) {
			t.Errorf("%s: machine %q, %v", c.name, got, err)
		}
	}
}
