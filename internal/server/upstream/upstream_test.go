// SPDX-License-Identifier: Apache-2.0

package upstream_test

import (
	"crypto/tls"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/server/upstream"
	"klatch/internal/wire"
)

const mirrorID = "mir_01jd0000000000000000000000"

// server is the one above, as far as a mirror sees it.
type server struct {
	*httptest.Server
	ca     *pki.CA
	token  wire.Token
	signed atomic.Int64 // certificates
	at     time.Time    // when it believes to sign
	refuse *wire.Problem
	raw    string // instead of a problem document
}

func newServer(t *testing.T) *server {
	t.Helper()
	ca, err := pki.NewCA("above", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	secret, err := pki.NewSecret()
	if err != nil {
		t.Fatal(err)
	}
	s := &server{ca: ca, token: secret.Token(ca.Fingerprint()), at: time.Now()}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	certPEM, keyPEM, err := ca.SignServer([]string{"127.0.0.1"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	s.TLS = pki.ServerTLS(cert)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	if s.raw != "" {
		w.WriteHeader(http.StatusForbidden)
		w.Write([]byte(s.raw))
		return
	}
	if s.refuse != nil {
		w.WriteHeader(s.refuse.Status)
		json.NewEncoder(w).Encode(s.refuse)
		return
	}
	if r.URL.Path == "/elsewhere" {
		http.Redirect(w, r, "https://elsewhere.example/", http.StatusFound)
		return
	}
	if r.Method == http.MethodGet {
		id, err := s.ca.VerifyMirror(r.TLS, time.Now())
		w.Write([]byte(id + string(fault.CodeOf(err))))
		return
	}
	var q struct{ CSR []byte }
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	csr, err := pki.ParseRequest(q.CSR)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	cert, expires, err := s.ca.SignMirror(csr, mirrorID, s.at)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	s.signed.Add(1)
	json.NewEncoder(w).Encode(wire.JoinAnswer{MirrorID: mirrorID, Certificate: cert, CA: s.ca.Certificate(), Expires: expires})
}

func get(t *testing.T, c *upstream.Client, address string) (string, error) {
	t.Helper()
	h, err := c.HTTP(t.Context(), time.Now())
	if err != nil {
		return "", err
	}
	a, err := h.Get(address)
	if err != nil {
		return "", err
	}
	defer a.Body.Close()
	b := make([]byte, 100)
	n, _ := a.Body.Read(b)
	return string(b[:n]), nil
}

func TestJoinIsKept(t *testing.T) {
	s := newServer(t)
	path := filepath.Join(t.TempDir(), "upstream.json")
	if c, err := upstream.Open(path); c != nil || err != nil {
		t.Errorf("before joining: %v, %v", c, err)
	}
	if _, err := upstream.Join(t.Context(), path, s.URL, s.token, "site"); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("credential: %v, %v", st, err)
	}
	if _, err := os.Stat(path + ".joining"); err == nil {
		t.Error("the key of the joining was left behind")
	}
	c, err := upstream.Open(path)
	if err != nil || c.MirrorID() != mirrorID || c.Server() != s.URL || !c.Serves(s.URL+"/") || c.Serves("https://elsewhere.example") {
		t.Fatalf("%+v, %v", c, err)
	}
	if got, err := get(t, c, s.URL+"/x"); got != mirrorID {
		t.Errorf("the server sees %q, %v", got, err)
	}
	if got, err := get(t, c, s.URL+"/elsewhere"); err != nil || strings.Contains(got, "mir_") {
		t.Errorf("a redirect was followed: %q, %v", got, err)
	}
}

func TestJoinThatIsRefused(t *testing.T) {
	s, other := newServer(t), newServer(t)
	for _, tt := range []struct {
		name, address string
		token         wire.Token
		refuse        *wire.Problem
		code          fault.Code
	}{
		{"the token of another server is not said to this one", s.URL, other.token, nil, "wrong_server"},
		{"half a token", s.URL, s.token[:20], nil, "token_malformed"},
		{"not https", strings.Replace(s.URL, "https", "http", 1), s.token, nil, "bad_server"},
		{"nobody there", "https://127.0.0.1:1", s.token, nil, "server_unavailable"},
		{"an expired token", s.URL, s.token, &wire.Problem{Type: fault.Denied, Status: 403, Title: "enrollment token expired", Code: "token_expired", Hint: "make another one"}, "token_expired"},
		{"something in between", s.URL, s.token, &wire.Problem{Type: "strange", Status: 502}, "server_strange"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.refuse = tt.refuse
			path := filepath.Join(t.TempDir(), "upstream.json")
			_, err := upstream.Join(t.Context(), path, tt.address, tt.token, "site")
			if fault.CodeOf(err) != tt.code || fault.HintOf(err) == "" || strings.Contains(err.Error(), string(s.token)) {
				t.Errorf("err = %v (%s), want %s and a hint", err, fault.CodeOf(err), tt.code)
			}
			if _, err := os.Stat(path); err == nil {
				t.Error("joined all the same")
			}
		})
	}
}

// TestALostAnswerIsAskedForAgainWithTheSameKey: the server then knows that it
// is no second mirror with a used token.
func TestALostAnswerIsAskedForAgainWithTheSameKey(t *testing.T) {
	s := newServer(t)
	path := filepath.Join(t.TempDir(), "upstream.json")
	var keys []string
	for range 2 {
		s.refuse = &wire.Problem{Type: fault.Unavailable, Status: 503, Title: "busy"}
		if _, err := upstream.Join(t.Context(), path, s.URL, s.token, "site"); fault.KindOf(err) != fault.Unavailable {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path + ".joining")
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, string(b))
	}
	if keys[0] != keys[1] {
		t.Error("another key the second time")
	}
}

func TestACertificateIsRenewedInTime(t *testing.T) {
	s := newServer(t)
	path := filepath.Join(t.TempDir(), "upstream.json")
	s.at = time.Now().Add(-pki.MirrorLife * 3 / 4)
	c, err := upstream.Join(t.Context(), path, s.URL, s.token, "site")
	if err != nil {
		t.Fatal(err)
	}
	s.at = time.Now()
	if got, err := get(t, c, s.URL); err != nil || got != mirrorID || s.signed.Load() != 2 || time.Until(c.Expires()) < pki.MirrorLife-time.Hour {
		t.Errorf("not renewed: %q, %v, %d, %s", got, err, s.signed.Load(), c.Expires())
	}
	c, err = upstream.Open(path)
	if err != nil || time.Until(c.Expires()) < pki.MirrorLife-time.Hour {
		t.Errorf("the renewed one was not kept: %v, %v", c, err)
	}
	if _, err := get(t, c, s.URL); err != nil || s.signed.Load() != 2 {
		t.Errorf("renewed again: %v", err)
	}
}

// TestARefusalIsToldInTheServersWords: readers of files would say only that a
// file cannot be had.
func TestARefusalIsToldInTheServersWords(t *testing.T) {
	s := newServer(t)
	path := filepath.Join(t.TempDir(), "upstream.json")
	c, err := upstream.Join(t.Context(), path, s.URL, s.token, "site")
	if err != nil {
		t.Fatal(err)
	}
	s.refuse = &wire.Problem{Type: fault.Denied, Status: 403, Title: "mirror was removed", Code: "mirror_removed", Hint: "ask"}
	if _, err := get(t, c, s.URL); fault.CodeOf(err) != "mirror_removed" || fault.HintOf(err) != "ask" || !strings.Contains(err.Error(), "removed") {
		t.Errorf("%v", err)
	}
	s.raw = "<html>Forbidden</html>"
	if _, err := get(t, c, s.URL); fault.CodeOf(err) != "server_strange" || fault.KindOf(err) != fault.Denied {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(path, []byte(`{"format":"klatch-mirror-identity/1","key":"U0VDUkVU"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := upstream.Open(path); fault.CodeOf(err) != "identity_malformed" || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("%v", err)
	}
}
