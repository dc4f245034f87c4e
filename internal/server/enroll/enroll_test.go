// SPDX-License-Identifier: Apache-2.0

package enroll_test

import (
	"bytes"
	"crypto/x509"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/server/enroll"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/store/storetest"
	"klatch/internal/wire"
)

func newEnroller(t *testing.T, now *time.Time) *enroll.Enroller {
	t.Helper()
	ca, err := pki.NewCA("test", *now)
	if err != nil {
		t.Fatal(err)
	}
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &enroll.Enroller{CA: ca, Tokens: db, Now: func() time.Time { return *now }}
}

func TestEnrollRefusesEachWithItsOwnCode(t *testing.T) {
	now := time.Now().UTC()
	e, foreign := newEnroller(t, &now), newEnroller(t, &now)
	used, _, err := e.NewToken(t.Context(), enroll.Order{})
	if err != nil {
		t.Fatal(err)
	}
	_, csr, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	request := func(token wire.Token, csr []byte) wire.EnrollRequest {
		return wire.EnrollRequest{Token: token, CSR: csr, Facts: storetest.Facts("h")}
	}
	if _, err := e.Enroll(t.Context(), request(used, []byte("junk"))); fault.CodeOf(err) != "bad_csr" {
		t.Errorf("bad request: %v", err)
	}
	first, err := e.Enroll(t.Context(), request(used, csr))
	if err != nil {
		t.Fatal(err) // the bad request has not used the token up
	}
	again, err := e.Enroll(t.Context(), request(used, csr))
	if err != nil || again.MachineID != first.MachineID {
		t.Errorf("the same key again: %v, %v", again.MachineID, err)
	}
	unknown, _, err := foreign.NewToken(t.Context(), enroll.Order{})
	if err != nil {
		t.Fatal(err)
	}
	expired, _, err := e.NewToken(t.Context(), enroll.Order{Expires: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	secret, err := pki.NewSecret()
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	fresh, _, err := e.NewToken(t.Context(), enroll.Order{})
	if err != nil {
		t.Fatal(err)
	}
	ours, _, err := pki.ParseToken(fresh)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Hour)
	for _, tt := range []struct {
		name  string
		token wire.Token
		kind  fault.Kind
		code  fault.Code
	}{
		{"used", used, fault.Denied, "token_used"},
		{"expired", expired, fault.Denied, "token_expired"},
		{"of another server", unknown, fault.Denied, "token_unknown"},
		{"our secret with the name of another server", ours.Token(foreign.CA.Fingerprint()), fault.Denied, "token_unknown"},
		{"invented", secret.Token(e.CA.Fingerprint()), fault.Denied, "token_unknown"},
		{"torn", used[:30], fault.Invalid, "token_malformed"},
	} {
		_, err := e.Enroll(t.Context(), request(tt.token, other))
		if fault.KindOf(err) != tt.kind || fault.CodeOf(err) != tt.code || fault.HintOf(err) == "" {
			t.Errorf("%s: %s %s (%q): %v", tt.name, fault.KindOf(err), fault.CodeOf(err), fault.HintOf(err), err)
		}
	}
}

func TestCertificateIsTheMachines(t *testing.T) {
	now := time.Now().UTC()
	e := newEnroller(t, &now)
	token, stored, err := e.NewToken(t.Context(), enroll.Order{Uses: 2, Tier: "canary"})
	if err != nil {
		t.Fatal(err)
	}
	if got := stored.Expires.Sub(now.Truncate(time.Second)); got != 24*time.Hour {
		t.Errorf("token expires after %s", got)
	}
	_, csr, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	a, err := e.Enroll(t.Context(), wire.EnrollRequest{Token: token, CSR: csr, Facts: storetest.Facts("h")})
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	if c.Subject.CommonName != a.MachineID || a.Tier != "canary" || !bytes.Equal(a.CA, e.CA.Certificate()) || !c.NotAfter.Equal(a.Expires) {
		t.Errorf("answer %+v", a)
	}
	r, err := e.Renew(a.MachineID, wire.RenewRequest{CSR: csr})
	if err != nil || r.Expires.Before(a.Expires) {
		t.Errorf("renewal until %s, %v", r.Expires, err)
	}
}

func TestMachineIDsSortByTime(t *testing.T) {
	form := regexp.MustCompile(`^mch_[0-9a-hjkmnp-tv-z]{26}$`)
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	last := ""
	for range 100 {
		id, err := enroll.NewMachineID(now)
		if err != nil {
			t.Fatal(err)
		}
		if !form.MatchString(id) || id <= last {
			t.Errorf("%s after %s", id, last)
		}
		last = id
		now = now.Add(37 * time.Hour)
	}
}

func TestOrdersThatAreRefused(t *testing.T) {
	now := time.Now()
	e := newEnroller(t, &now)
	for code, o := range map[fault.Code]enroll.Order{
		"bad_uses":   {Uses: -1},
		"bad_expiry": {Expires: 365 * 24 * time.Hour},
		"bad_tier":   {Tier: "No Tier"},
	} {
		if _, _, err := e.NewToken(t.Context(), o); fault.CodeOf(err) != code {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
