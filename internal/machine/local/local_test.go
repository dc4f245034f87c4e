// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/wire"
)

// daemon counts what changed something.
type daemon struct {
	changes int
	err     error
	token   wire.Token
}

func (d *daemon) Status(context.Context) agent.Status {
	return agent.Status{Version: 1, State: wire.State{State: "confirmed", Sequence: 3}, Queued: d.changes}
}
func (d *daemon) History() []agent.Entry {
	return []agent.Entry{{Event: wire.EventLoaded, Sequence: 3}}
}
func (d *daemon) CheckNow(context.Context) error {
	d.changes++
	return d.err
}
func (d *daemon) Retry(context.Context) error  { d.changes++; return d.err }
func (d *daemon) Resume(context.Context) error { d.changes++; return d.err }
func (d *daemon) Enroll(_ context.Context, _ string, t wire.Token) (agent.Identity, error) {
	d.changes++
	d.token = t
	return agent.Identity{MachineID: "mch_1", Tier: "stable"}, d.err
}

// TestRoutesAtAllLevels walks every route as root, as another user, and as
// somebody whom the kernel does not name.
func TestRoutesAtAllLevels(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, r := range routes {
		for _, who := range []struct {
			name string
			ctx  func(context.Context) context.Context
			root bool
		}{
			{"root", func(c context.Context) context.Context { return context.WithValue(c, peerKey{}, uint32(0)) }, true},
			{"a user", func(c context.Context) context.Context { return context.WithValue(c, peerKey{}, uint32(1000)) }, false},
			{"the daemon's own user", func(c context.Context) context.Context { return context.WithValue(c, peerKey{}, uint32(998)) }, false},
			{"unknown", func(c context.Context) context.Context { return c }, false},
		} {
			t.Run(r.method+" "+r.path+" by "+who.name, func(t *testing.T) {
				d := &daemon{}
				w := httptest.NewRecorder()
				q := httptest.NewRequest(r.method, r.path, strings.NewReader(`{"server":"https://s","token":"klatch1.x.y"}`))
				Handler(d, log).ServeHTTP(w, q.WithContext(who.ctx(t.Context())))
				allowed := who.root || r.level == Anybody
				if want := map[bool]int{true: 200, false: 403}[allowed]; w.Code != want {
					t.Errorf("status %d, want %d: %s", w.Code, want, w.Body)
				}
				if !allowed && d.changes > 0 {
					t.Error("refused, and done all the same")
				}
				if r.method != http.MethodGet && r.level == Anybody {
					t.Error("a route that changes something is for anybody")
				}
				if strings.Contains(w.Body.String(), "klatch1.") {
					t.Errorf("the answer holds the token: %s", w.Body)
				}
			})
		}
	}
}

// serve runs the API on a real socket, where the kernel says who asks.
func serve(t *testing.T, d Daemon) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "klatch")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, d, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return Dial(path)
}

func TestClientAndServer(t *testing.T) {
	d := &daemon{}
	c := serve(t, d)
	s, err := c.Status(t.Context())
	if err != nil || s.State.State != "confirmed" {
		t.Fatalf("status %+v, %v", s, err)
	}
	h, err := c.History(t.Context())
	if err != nil || len(h.Entries) != 1 {
		t.Fatalf("history %+v, %v", h, err)
	}
	_, err = c.Enroll(t.Context(), EnrollRequest{"https://s", "klatch1.x.y"})
	if os.Geteuid() != 0 {
		if fault.KindOf(err) != fault.Denied {
			t.Errorf("enroll by a user: %v", err)
		}
		return
	}
	if err != nil || d.token != "klatch1.x.y" {
		t.Errorf("enroll: %v, token %q", err, d.token)
	}
	r, err := c.Check(t.Context())
	if err != nil || r.Before.Queued != 1 || r.After.Queued != 2 {
		t.Errorf("check: before %d, after %d, %v", r.Before.Queued, r.After.Queued, err)
	}
	d.err = fault.New(fault.Conflict, "under_way", "livepatch 3 is soaking").WithHint("later")
	_, err = c.Retry(t.Context())
	if fault.KindOf(err) != fault.Conflict || fault.CodeOf(err) != "under_way" || fault.HintOf(err) != "later" || err.Error() != "livepatch 3 is soaking" {
		t.Errorf("a refusal came back as %#v", err)
	}
	d.err = errors.New("boom")
	if _, err = c.Check(t.Context()); fault.KindOf(err) != fault.Internal {
		t.Errorf("a broken daemon: %v", err)
	}
}

// One user's connections do not keep the others from the daemon, nor grow
// without end.
func TestOneUserHasFewConnections(t *testing.T) {
	dir := t.TempDir()
	inner, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	l := &limited{Listener: fakePeers{inner}, open: map[uint32]int{}}
	defer l.Close()
	accepted := make(chan net.Conn, 3*maxConnections)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func(n int) {
		for range n {
			c, err := net.Dial("unix", filepath.Join(dir, "s"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
		}
	}
	dial(maxConnections + 5)
	var held []net.Conn
	for range maxConnections {
		held = append(held, <-accepted)
	}
	select {
	case <-accepted:
		t.Error("one connection more than allowed")
	case <-time.After(100 * time.Millisecond):
	}
	_ = held[0].Close()
	_ = held[0].Close() // twice counts once
	dial(2)
	select {
	case <-accepted:
	case <-time.After(5 * time.Second):
		t.Error("a place that was given up is not taken again")
	}
	select {
	case <-accepted:
		t.Error("one place was given up, two were taken")
	case <-time.After(100 * time.Millisecond):
	}
}

// fakePeers makes every connection that of one user.
type fakePeers struct{ net.Listener }

func (f fakePeers) Accept() (net.Conn, error) {
	c, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &counted{Conn: c, uid: 1000, end: func() {}}, nil
}

func TestALongRequestIsRefused(t *testing.T) {
	d := &daemon{}
	w := httptest.NewRecorder()
	q := httptest.NewRequest(http.MethodPost, "/v1/enroll", strings.NewReader(`{"server":"https://s","token":"`+strings.Repeat("t", maxRequest)+`"}`))
	Handler(d, slog.New(slog.DiscardHandler)).ServeHTTP(w, q.WithContext(context.WithValue(t.Context(), peerKey{}, uint32(0))))
	if w.Code != http.StatusBadRequest || d.changes > 0 {
		t.Errorf("status %d, %d changes", w.Code, d.changes)
	}
}

func TestNoDaemon(t *testing.T) {
	_, err := Dial(filepath.Join(t.TempDir(), "none")).Status(t.Context())
	if fault.KindOf(err) != fault.Unavailable || fault.HintOf(err) == "" {
		t.Errorf("err = %v", err)
	}
}

func FuzzParseEnroll(f *testing.F) {
	f.Add([]byte(`{"server":"https://s","token":"klatch1.a.b"}`))
	f.Add([]byte(`{"server":"","token":"t","more":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseEnroll(bytes.NewReader(b))
		if err == nil && (q.Server == "" || q.Token == "") {
			t.Errorf("accepted %+v", q)
		}
		if err != nil && len(q.Token) > 30 && strings.Contains(err.Error(), string(q.Token)) {
			t.Errorf("the error holds the token: %v", err)
		}
	})
}

func FuzzParseProblem(f *testing.F) {
	f.Add([]byte(`{"type":"denied","title":"no","status":403}`))
	f.Add([]byte(`{"type":"strange"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := parseProblem(b); err == nil || fault.ExitStatus(err) == 0 {
			t.Errorf("%q became %v", b, err)
		}
	})
}
