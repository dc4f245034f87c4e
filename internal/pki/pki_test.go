// SPDX-License-Identifier: Apache-2.0

package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/wire"
)

const machineID = "mch_01jd0000000000000000000000"

func newCA(t *testing.T) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA("test CA", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// serve answers with the machine id or the code of the refusal.
func serve(t *testing.T, ca *pki.CA, now func() time.Time, names ...string) string {
	t.Helper()
	certPEM, keyPEM, err := ca.SignServer(names, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := ca.VerifyMachine(r.TLS, now())
		fmt.Fprint(w, id, fault.CodeOf(err))
	}))
	s.TLS = pki.ServerTLS(cert)
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func get(t *testing.T, address string, c *tls.Config) (string, error) {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: c}
	defer tr.CloseIdleConnections()
	a, err := (&http.Client{Transport: tr, Timeout: 5 * time.Second}).Get(address)
	if err != nil {
		return "", err
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	return string(b), err
}

func TestMachineIsKnownByItsCertificate(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	now := time.Now()
	address := serve(t, ca, func() time.Time { return now }, "127.0.0.1")

	keyPEM, csr, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	req, err := pki.ParseRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	config := func(signer *pki.CA, at time.Time) *tls.Config {
		der, _, err := signer.SignMachine(req, machineID, at)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pki.LoadMachine(der, keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		c, err := pki.TLSForMachine(ca.Certificate(), func() (*tls.Certificate, error) { return &cert, nil })
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	none, err := pki.TLSForMachine(ca.Certificate(), func() (*tls.Certificate, error) { return &tls.Certificate{}, nil })
	if err != nil {
		t.Fatal(err)
	}
	serverPEM, serverKey, err := ca.SignServer([]string{"127.0.0.1"}, now)
	if err != nil {
		t.Fatal(err)
	}
	serverCert, err := tls.X509KeyPair(serverPEM, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	asServer, err := pki.TLSForMachine(ca.Certificate(), func() (*tls.Certificate, error) { return &serverCert, nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		c    *tls.Config
		want string
	}{
		{"its own", config(ca, now), machineID},
		{"none", none, "certificate_missing"},
		{"of another CA", config(other, now), "certificate_unknown"},
		{"expired", config(ca, now.Add(-pki.MachineLife-time.Minute)), "certificate_expired"},
		{"a server's certificate", asServer, "certificate_unknown"},
	} {
		if got, err := get(t, address, tt.c); got != tt.want {
			t.Errorf("%s: %q, want %q: %v", tt.name, got, tt.want, err)
		}
	}
	old := config(ca, now)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if _, err := get(t, address, old); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
}

func TestTokenFindsItsServer(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	secret, err := pki.NewSecret()
	if err != nil {
		t.Fatal(err)
	}
	address := serve(t, ca, time.Now, "127.0.0.1")
	elsewhere := serve(t, ca, time.Now, "klatch.example.org")
	for _, tt := range []struct {
		name    string
		token   wire.Token
		address string
		want    fault.Code
	}{
		{"the right server", secret.Token(ca.Fingerprint()), address, ""},
		{"another server", secret.Token(other.Fingerprint()), address, "wrong_server"},
		{"the right server under a wrong name", secret.Token(ca.Fingerprint()), elsewhere, "server_untrusted"},
	} {
		c, err := pki.TLSForToken(tt.token, "127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := get(t, tt.address, c); fault.CodeOf(err) != tt.want {
			t.Errorf("%s: code %q, want %q: %v", tt.name, fault.CodeOf(err), tt.want, err)
		}
	}
}

func TestTokenFormAndSecrecy(t *testing.T) {
	secret, err := pki.NewSecret()
	if err != nil {
		t.Fatal(err)
	}
	ca := newCA(t).Fingerprint()
	token := secret.Token(ca)
	s, fp, err := pki.ParseToken(token)
	if err != nil || s != secret || fp != ca {
		t.Errorf("token does not come back: %v", err)
	}
	for _, bad := range []wire.Token{"", "klatch1", "klatch2" + token[7:], token + "x", token[:len(token)-1], token + ".x", " " + token, token[:20]} {
		_, _, err := pki.ParseToken(bad)
		if fault.CodeOf(err) != "token_malformed" {
			t.Errorf("token %q: %v", bad, err)
		} else if strings.Contains(err.Error(), string(token[8:16])) {
			t.Errorf("the error shows the token: %v", err)
		}
	}
	j, err := json.Marshal(map[string]any{"s": secret})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{fmt.Sprint(secret), fmt.Sprintf("%v %+v %#v %x %s %d", secret, secret, secret, secret, secret, secret), string(j), secret.LogValue().String()} {
		if strings.Contains(text, secret.Reveal()) || !strings.Contains(text, "redacted") {
			t.Errorf("secret shows: %s", text)
		}
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wrongCurve, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p384)
	if err != nil {
		t.Fatal(err)
	}
	_, csr, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	csr[len(csr)-1] ^= 1
	for name, b := range map[string][]byte{"nothing": nil, "another curve": wrongCurve, "a bad signature": csr} {
		if _, err := pki.ParseRequest(b); fault.CodeOf(err) != "bad_csr" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCAComesBack(t *testing.T) {
	ca := newCA(t)
	certPEM, keyPEM, err := ca.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := pki.LoadCA(certPEM, keyPEM)
	if err != nil || again.Fingerprint() != ca.Fingerprint() {
		t.Fatal(err)
	}
	_, otherKey, err := newCA(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadCA(certPEM, otherKey); err == nil {
		t.Error("a foreign key was taken")
	}
	for _, names := range [][]string{nil, {"a b"}, {"http://x"}, {"UPPER"}} {
		if _, _, err := ca.SignServer(names, time.Now()); err == nil {
			t.Errorf("names %q were taken", names)
		}
	}
}
