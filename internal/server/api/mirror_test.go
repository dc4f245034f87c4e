// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/server/enroll"
	"klatch/internal/server/store"
	"klatch/internal/server/store/storetest"
	"klatch/internal/wire"
)

const timestamp = "/metadata/timestamp.json"

// TestWhoReadsTheRepository: an open one anybody, a closed one who has a
// certificate of this server; who claims to be a mirror must be one.
func TestWhoReadsTheRepository(t *testing.T) {
	w := newWorld(t)
	closed := false
	w.Closed = func() bool { return closed }
	other, err := pki.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-pki.MirrorLife - time.Hour)
	if err := w.Store.MirrorSeen(t.Context(), storetest.MirrorID(3), time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := w.Store.RemoveMirror(t.Context(), storetest.MirrorID(3), time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name         string
		client       *http.Client
		open, closed fault.Code
	}{
		{"nobody", w.machine(""), "", "certificate_missing"},
		{"a machine", w.machine(storetest.MachineID(1)), "", ""},
		{"a machine of another server", w.client(other, storetest.MachineID(1), time.Now()), "", "certificate_unknown"},
		{"a mirror", w.machine(storetest.MirrorID(1)), "", ""},
		{"a mirror of another server", w.client(other, storetest.MirrorID(1), time.Now()), "certificate_unknown", "certificate_unknown"},
		{"a mirror that was away too long", w.client(w.CA, storetest.MirrorID(2), long), "certificate_expired", "certificate_expired"},
		{"a mirror that was removed", w.machine(storetest.MirrorID(3)), "mirror_removed", "mirror_removed"},
	} {
		for _, closed = range []bool{false, true} {
			want := tt.open
			if closed {
				want = tt.closed
			}
			status, b, _ := w.do(tt.client, "GET", w.fleet+timestamp, nil, nil)
			var p wire.Problem
			if want == "" && status != 200 || want != "" && (status != 403 || json.Unmarshal(b, &p) != nil || p.Code != want || p.Hint == "") {
				t.Errorf("%s, closed %v: %d %s, want %q", tt.name, closed, status, b, want)
			}
		}
	}
	// A removed one does not get a file whose name it knows either.
	if status, b, _ := w.do(w.machine(storetest.MirrorID(3)), "GET", w.fleet+"/metadata/1.root.json", nil, nil); status != 403 {
		t.Errorf("%d %s", status, b)
	}
	list, err := w.Store.Mirrors(t.Context())
	if err != nil || len(list) != 2 || list[0].ID != storetest.MirrorID(1) || time.Since(list[0].LastSeen) > time.Minute {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestAMirrorJoinsWithATokenOfItsOwn(t *testing.T) {
	w := newWorld(t)
	token := func(role store.Role) wire.Token {
		s, _, err := w.Enroller.NewToken(t.Context(), enroll.Order{Role: role})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	_, csr, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	forMirror := token(store.ForMirror)
	for _, tt := range []struct {
		name, path string
		q          any
		code       fault.Code
	}{
		{"a machine's token", "/v1/join", wire.JoinRequest{Token: token(""), CSR: csr, Name: "site"}, "token_role"},
		{"no name", "/v1/join", wire.JoinRequest{Token: forMirror, CSR: csr}, "bad_name"},
		{"no request", "/v1/join", wire.JoinRequest{Token: forMirror, Name: "site"}, "bad_csr"},
		{"a mirror's token at the machines' door", "/v1/enroll", wire.EnrollRequest{Token: forMirror, CSR: csr, Facts: storetest.Facts("h")}, "token_role"},
		{"and none of that used it up", "/v1/join", wire.JoinRequest{Token: forMirror, CSR: csr, Name: "site"}, ""},
	} {
		status, b, _ := w.do(w.machine(""), "POST", w.fleet+tt.path, tt.q, nil)
		if tt.code == "" && status != 200 || tt.code != "" && code(b) != tt.code {
			t.Errorf("%s: %d %s", tt.name, status, b)
		}
	}
	if _, _, err := w.Enroller.NewToken(t.Context(), enroll.Order{Role: "king"}); fault.CodeOf(err) != "bad_role" {
		t.Errorf("a role that is none: %v", err)
	}
	m := w.machine(storetest.MirrorID(1))
	status, b, _ := w.do(m, "POST", w.fleet+"/v1/join/renew", wire.RenewRequest{CSR: csr}, nil)
	var a wire.RenewAnswer
	if err := json.Unmarshal(b, &a); status != 200 || err != nil || len(a.Certificate) == 0 {
		t.Errorf("%d %s", status, b)
	}
}
