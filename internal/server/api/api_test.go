// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/obs"
	"klatch/internal/pki"
	"klatch/internal/server/api"
	"klatch/internal/server/blob/fsblob"
	"klatch/internal/server/enroll"
	"klatch/internal/server/ingest"
	"klatch/internal/server/repo"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/store/storetest"
	"klatch/internal/server/web"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/wire"
)

const adminToken = "correct-horse-battery-staple"

// world is a server on two listeners.
type world struct {
	*api.API
	t            *testing.T
	fleet, admin string
	log          *bytes.Buffer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	now := time.Now()
	ca, err := pki.NewCA("test", now)
	if err != nil {
		t.Fatal(err)
	}
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	w := &world{t: t, log: &bytes.Buffer{}}
	log := obs.NewJSON(w.log, slog.LevelDebug)
	p := pubsim.New(t, "acme", now)
	p.Release(now, storetest.Facts("").Kernel, 1, "CVE-2026-0001")
	r := repo.New(fsblob.New(t.TempDir()), filepath.Join(t.TempDir(), "upstream"), p.Anchor, log)
	if _, err := r.Sync(t.Context(), repo.Source{BaseURL: p.Serve(), Client: http.DefaultClient}, now); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(adminToken))
	w.API = &api.API{
		CA: ca, Store: db, Repo: r, Now: time.Now, Log: log, AdminDigest: hex.EncodeToString(digest[:]),
		Enroller: &enroll.Enroller{CA: ca, Tokens: db, Mirrors: db, Now: time.Now},
		Ingester: &ingest.Ingester{Machines: db, Reports: db, Now: time.Now, Log: log, Published: func(string) []fleet.Published { return r.Catalog().Published() }},
		Pages:    &web.Pages{Machines: db, Catalog: r.Catalog, Now: time.Now, Version: "test"},
	}
	certPEM, keyPEM, err := ca.SignServer([]string{"127.0.0.1"}, now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	f := httptest.NewUnstartedServer(w.Fleet())
	f.TLS = pki.ServerTLS(cert)
	f.StartTLS()
	t.Cleanup(f.Close)
	a := httptest.NewServer(w.Admin())
	t.Cleanup(a.Close)
	w.fleet, w.admin = f.URL, a.URL
	return w
}

// machine is an http.Client with the certificate of a machine or a mirror, or
// none for an empty id.
func (w *world) machine(id string) *http.Client { return w.client(w.CA, id, time.Now()) }

func (w *world) client(ca *pki.CA, id string, at time.Time) *http.Client {
	w.t.Helper()
	keyPEM, csr, err := pki.NewMachineKey()
	if err != nil {
		w.t.Fatal(err)
	}
	cert := tls.Certificate{}
	if id != "" {
		req, err := pki.ParseRequest(csr)
		if err != nil {
			w.t.Fatal(err)
		}
		sign := ca.SignMachine
		if strings.HasPrefix(id, "mir_") {
			sign = ca.SignMirror
		}
		der, _, err := sign(req, id, at)
		if err != nil {
			w.t.Fatal(err)
		}
		if cert, err = pki.LoadMachine(der, keyPEM); err != nil {
			w.t.Fatal(err)
		}
	}
	c, err := pki.TLSForMachine(w.CA.Certificate(), func() (*tls.Certificate, error) { return &cert, nil })
	if err != nil {
		w.t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: c}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (w *world) do(c *http.Client, method, address string, body any, change func(*http.Request)) (int, []byte, http.Header) {
	w.t.Helper()
	var b []byte
	switch v := body.(type) {
	case nil:
	case []byte:
		b = v
	default:
		var err error
		if b, err = json.Marshal(v); err != nil {
			w.t.Fatal(err)
		}
	}
	r, err := http.NewRequestWithContext(w.t.Context(), method, address, bytes.NewReader(b))
	if err != nil {
		w.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	if change != nil {
		change(r)
	}
	a, err := c.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer a.Body.Close()
	out, err := io.ReadAll(a.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return a.StatusCode, out, a.Header
}

func code(b []byte) fault.Code {
	var p wire.Problem
	if json.Unmarshal(b, &p) != nil {
		return "no problem document"
	}
	return p.Code
}

func bearer(r *http.Request) { r.Header.Set("Authorization", "Bearer "+adminToken) }
func basic(r *http.Request)  { r.SetBasicAuth("anybody", adminToken) }

// TestRoutesAtAllLevels asks for every route on both listeners as nobody, as a
// machine and as the admin: each is served at its level and nowhere else.
func TestRoutesAtAllLevels(t *testing.T) {
	w := newWorld(t)
	nobody, machine, mirror := w.machine(""), w.machine(storetest.MachineID(1)), w.machine(storetest.MirrorID(1))
	open := func(r api.Route) bool { return r.Access == api.Public || r.Access == api.Reader }
	for _, route := range api.Routes {
		path := strings.NewReplacer("{$}", "", "{file}", "timestamp.json", "{path...}", "x/y").Replace(route.Pattern)
		for _, tt := range []struct {
			name   string
			client *http.Client
			base   string
			change func(*http.Request)
			may    bool
			want   int // if it may not
		}{
			{"nobody on the fleet's listener", nobody, w.fleet, nil, open(route), 403},
			{"a machine on the fleet's listener", machine, w.fleet, nil, open(route) || route.Access == api.Machine, 403},
			{"a mirror on the fleet's listener", mirror, w.fleet, nil, open(route) || route.Access == api.Mirror, 403},
			{"the admin on the fleet's listener", nobody, w.fleet, bearer, open(route), 403},
			{"nobody on the admin's listener", http.DefaultClient, w.admin, nil, false, 401},
			{"a wrong password on the admin's listener", http.DefaultClient, w.admin, func(r *http.Request) { r.SetBasicAuth("admin", "wrong") }, false, 401},
			{"the admin on the admin's listener", http.DefaultClient, w.admin, basic, route.Access == api.Admin, 404},
			{"the admin with a bearer token", http.DefaultClient, w.admin, bearer, route.Access == api.Admin, 404},
		} {
			want := tt.want
			if (tt.base == w.fleet) == (route.Access == api.Admin) {
				want = 404 // the route is not on this listener at all
			}
			status, body, _ := w.do(tt.client, route.Method, tt.base+path, []byte("{}"), tt.change)
			if tt.may {
				// Bad bodies and missing files are fine: the caller was let in.
				if status == 401 || status == 403 || code(body) == "no_route" {
					t.Errorf("%s %s as %s: %d %s", route.Method, path, tt.name, status, body)
				}
			} else if status != want {
				t.Errorf("%s %s as %s: %d, want %d: %s", route.Method, path, tt.name, status, want, body)
			}
		}
	}
}

func TestMachineJourney(t *testing.T) {
	w := newWorld(t)
	token, _, err := w.Enroller.NewToken(t.Context(), enroll.Order{})
	if err != nil {
		t.Fatal(err)
	}
	_, csr, err := pki.NewMachineKey()
	if err != nil {
		t.Fatal(err)
	}
	facts := storetest.Facts("host-1")
	q := wire.EnrollRequest{Token: token, CSR: csr, Facts: facts}
	status, b, _ := w.do(w.machine(""), "POST", w.fleet+"/v1/enroll", q, nil)
	var got wire.EnrollAnswer
	if err := json.Unmarshal(b, &got); status != 200 || err != nil || got.MachineID == "" {
		t.Fatal(status, string(b))
	}
	m := w.machine(got.MachineID)
	status, b, _ = w.do(m, "POST", w.fleet+"/v1/check", wire.CheckRequest{Facts: facts, State: wire.State{State: "no_livepatch"}}, nil)
	var answer wire.CheckAnswer
	if err := json.Unmarshal(b, &answer); status != 200 || err != nil || answer.Offer == nil || answer.Offer.Sequence != 1 {
		t.Fatal(status, string(b))
	}
	r := wire.Report{Key: "k1", Event: wire.EventConfirmed, At: time.Now(), Sequence: 1, Facts: facts, State: wire.State{State: "confirmed", Sequence: 1}}
	for range 2 {
		if status, b, _ := w.do(m, "POST", w.fleet+"/v1/reports", r, nil); status != 204 || len(b) != 0 {
			t.Fatal(status, string(b))
		}
	}
	if status, b, _ := w.do(m, "POST", w.fleet+"/v1/renew", wire.RenewRequest{CSR: csr}, nil); status != 200 {
		t.Error(status, string(b))
	}
	status, b, h := w.do(http.DefaultClient, "GET", w.admin+"/api/v1/machines", nil, bearer)
	if status != 200 || !strings.Contains(string(b), `"host-1"`) || !strings.Contains(string(b), `"confirmed"`) {
		t.Error(status, string(b))
	}
	if h.Get("Cache-Control") != "no-store" {
		t.Errorf("headers %v", h)
	}
	status, b, _ = w.do(http.DefaultClient, "GET", w.admin+"/api/v1/reports?machine="+got.MachineID, nil, bearer)
	if status != 200 || strings.Count(string(b), `"k1"`) != 1 {
		t.Error(status, string(b))
	}
	if text := w.log.String(); strings.Contains(text, string(token)) || strings.Contains(text, adminToken) || strings.Contains(text, string(token)[8:30]) {
		t.Errorf("a secret is in the log:\n%s", text)
	}
}

func TestWhatIsRefused(t *testing.T) {
	w := newWorld(t)
	nobody, m := w.machine(""), w.machine(storetest.MachineID(1))
	for _, tt := range []struct {
		name   string
		client *http.Client
		method string
		path   string
		body   any
		status int
		code   fault.Code
	}{
		{"too long", nobody, "POST", "/v1/enroll", bytes.Repeat([]byte(" "), wire.MaxBody+1), 400, "body_too_large"},
		{"no JSON", nobody, "POST", "/v1/enroll", []byte("token=klatch1.x.y"), 400, "bad_body"},
		{"two documents", nobody, "POST", "/v1/enroll", []byte("{} {}"), 400, "bad_body"},
		{"no facts", nobody, "POST", "/v1/enroll", wire.RenewRequest{}, 400, "bad_report"},
		{"a bad token", nobody, "POST", "/v1/enroll", wire.EnrollRequest{Token: "x", Facts: storetest.Facts("h")}, 400, "token_malformed"},
		{"a bad build id", m, "POST", "/v1/check", []byte(`{"facts":{"kernel":{"build_id":"xyz"}}}`), 400, "bad_build_id"},
		{"a report without a key", m, "POST", "/v1/reports", wire.Report{Event: "booted", Facts: storetest.Facts("h")}, 400, "bad_report"},
		{"a path that is not there", m, "GET", "/v1/nothing", nil, 404, "no_route"},
		{"a wrong method", m, "GET", "/v1/check", nil, 404, "no_route"},
	} {
		status, b, h := w.do(tt.client, tt.method, w.fleet+tt.path, tt.body, nil)
		if status != tt.status || code(b) != tt.code || h.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %d %s, want %d %s: %s", tt.name, status, code(b), tt.status, tt.code, b)
		}
	}
	for name, change := range map[string]func(*http.Request){
		"a foreign page": func(r *http.Request) { basic(r); r.Header.Set("Sec-Fetch-Site", "cross-site") },
		"a form":         func(r *http.Request) { basic(r); r.Header.Set("Content-Type", "text/plain") },
	} {
		if status, b, _ := w.do(http.DefaultClient, "POST", w.admin+"/api/v1/tokens", []byte("{}"), change); status == 200 {
			t.Errorf("%s made a token: %s", name, b)
		}
	}
	if status, b, _ := w.do(http.DefaultClient, "POST", w.admin+"/api/v1/tokens", []byte(`{"uses":2}`), basic); status != 200 || !strings.Contains(string(b), "klatch1.") {
		t.Error(status, string(b))
	}
}
