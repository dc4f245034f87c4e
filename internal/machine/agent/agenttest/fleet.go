// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/pki"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

// Fleet is a server on a real socket: TLS with a CA of its own, the API of
// package wire before a Server, and a signed repository.
type Fleet struct {
	*Server
	Repo  *tufsim.Repo
	Pub   *Publisher
	URL   string
	Token wire.Token

	t               testing.TB
	mux             *http.ServeMux
	ca              *pki.CA
	secret          pki.Secret
	bytes, renewals atomic.Int64
}

// hostAddress is 127.0.0.1 as a guest in the lab sees it (lab.HostAddress,
// which a machine's package cannot import).
const hostAddress = "10.0.2.2"

// NewFleet starts one.
func NewFleet(t testing.TB, seed string) *Fleet {
	t.Helper()
	now := time.Now()
	f := &Fleet{Server: NewServer(), Repo: tufsim.New(t, seed, now), Pub: NewPublisher(t), t: t}
	f.Repo.Publish(now) // an empty repository has metadata too
	f.Pub.Anchor.Root = f.Repo.Root
	var err error
	if f.ca, err = pki.NewCA("test", now); err != nil {
		t.Fatal(err)
	}
	if f.secret, err = pki.NewSecret(); err != nil {
		t.Fatal(err)
	}
	f.Token = f.secret.Token(f.ca.Fingerprint())
	certPEM, keyPEM, err := f.ca.SignServer([]string{"127.0.0.1", hostAddress}, now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	f.mux = mux
	mux.HandleFunc("POST /v1/enroll", serve(f, false, func(_ string, q wire.EnrollRequest) (any, error) { return f.enroll(q) }))
	mux.HandleFunc("POST /v1/renew", serve(f, true, func(id string, q wire.RenewRequest) (any, error) { return f.renew(id, q.CSR) }))
	mux.HandleFunc("POST /v1/check", serve(f, true, func(_ string, q wire.CheckRequest) (any, error) { return f.Check(t.Context(), q) }))
	mux.HandleFunc("POST /v1/reports", serve(f, true, func(_ string, q wire.Report) (any, error) { return nil, f.Report(t.Context(), q) }))
	mux.Handle("/", f.Repo.Handler())
	s := httptest.NewUnstartedServer(mux)
	s.TLS = pki.ServerTLS(cert)
	s.Listener = countingListener{s.Listener, &f.bytes}
	s.StartTLS()
	t.Cleanup(s.Close)
	f.URL = "https://" + s.Listener.Addr().String()
	return f
}

// Also serves something more, before anybody asks for it.
func (f *Fleet) Also(pattern string, h http.Handler) { f.mux.Handle(pattern, h) }

// serve is one route; member says that only enrolled machines may use it.
func serve[T any](f *Fleet, member bool, do func(id string, q T) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var id string
		var err error
		if member {
			id, err = f.ca.VerifyMachine(r.TLS, time.Now())
		}
		var q T
		if err == nil {
			err = json.NewDecoder(r.Body).Decode(&q)
		}
		var v any
		if err == nil {
			v, err = do(id, q)
		}
		if err != nil {
			w.WriteHeader(fault.HTTPStatus(err))
			v = wire.Problem{Type: fault.KindOf(err), Title: err.Error(), Status: fault.HTTPStatus(err), Code: fault.CodeOf(err), Hint: fault.HintOf(err)}
		}
		if v == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		_ = json.NewEncoder(w).Encode(v) // the machine may have died
	}
}

func (f *Fleet) enroll(q wire.EnrollRequest) (wire.EnrollAnswer, error) {
	var a wire.EnrollAnswer
	secret, _, err := pki.ParseToken(q.Token)
	if err != nil {
		return a, err
	}
	if secret.Digest() != f.secret.Digest() {
		return a, fault.New(fault.Denied, "token_unknown", "token is not known").WithHint("ask for a new one")
	}
	r, err := f.renew(MachineID, q.CSR)
	return wire.EnrollAnswer{MachineID: MachineID, Tier: "stable", Certificate: r.Certificate, CA: f.ca.Certificate(), Expires: r.Expires}, err
}

func (f *Fleet) renew(id string, csr []byte) (wire.RenewAnswer, error) {
	f.renewals.Add(1)
	return f.Certify(id, csr, time.Now())
}

// Certify signs a machine's request as the server did at some time.
func (f *Fleet) Certify(id string, csr []byte, at time.Time) (wire.RenewAnswer, error) {
	req, err := pki.ParseRequest(csr)
	if err != nil {
		return wire.RenewAnswer{}, err
	}
	der, expires, err := f.ca.SignMachine(req, id, at)
	return wire.RenewAnswer{Certificate: der, Expires: expires}, err
}

// Certified counts the certificates that the server gave out.
func (f *Fleet) Certified() int64 { return f.renewals.Load() }

// Bytes counts what went over the server's connections, both ways.
func (f *Fleet) Bytes() int64 { return f.bytes.Load() }

type countingListener struct {
	net.Listener
	n *atomic.Int64
}

func (l countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return countingConn{c, l.n}, err
}

type countingConn struct {
	net.Conn
	n *atomic.Int64
}

func (c countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
}

func (c countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// Publish signs a livepatch into the repository and offers it.
func (f *Fleet) Publish(k kernel.Build, s livepatch.Sequence, fixes ...cve.ID) livepatch.Manifest {
	f.t.Helper()
	m, bundle := f.Pub.Livepatch(k, s, fixes...)
	f.Repo.Publish(time.Now(), tufrepo.Target{Path: m.TargetPath(), Content: bundle})
	f.OfferTarget(m.TargetPath(), s)
	return m
}

// Install makes a machine believe this publisher.
func (f *Fleet) Install(m *Machine) {
	f.t.Helper()
	b, err := trustsign.Anchor(*f.Pub.Anchor)
	if err != nil {
		f.t.Fatal(err)
	}
	m.Anchor = f.Pub.Anchor
	m.Write("etc/klatch/trust.json", string(b))
	m.Write("etc/klatch/allow-lab-keys", "")
}

// ServeLoader answers for the machine's loader on a real socket.
func ServeLoader(t testing.TB, m *Machine) (path string) {
	t.Helper()
	dir := ShortDir(t)
	path = filepath.Join(dir, "loader.sock")
	l := listen(t, path)
	stop, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-done; _ = l.Close() })
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := l.Accept(50 * time.Millisecond)
			if errors.Is(err, loaderapi.ErrIdle) {
				continue
			}
			if err != nil {
				t.Errorf("accept: %v", err)
				return
			}
			m.answerTo(t, c)
		}
	}()
	return path
}

// listen hands the loader its socket as systemd does: as a number.
func listen(t testing.TB, path string) *loaderapi.Listener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close() //nolint:errcheck // the copy below stays open
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // as above
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	on, err := loaderapi.On(fd)
	if err != nil {
		t.Fatal(err)
	}
	return on
}

func (m *Machine) answerTo(t testing.TB, c *loaderapi.Conn) {
	defer c.Close() //nolint:errcheck // a test
	r, files, err := c.Receive()
	if err != nil {
		return // the daemon was killed while it asked
	}
	defer loaderapi.CloseFiles(files)
	var a loaderapi.Answer
	ctx := t.Context()
	switch r.Op {
	case loaderapi.OpLoad:
		a.Status, err = m.Load(ctx, files[0], files[1])
	case loaderapi.OpConfirm:
		a.Status, err = m.Confirm(ctx, r.Sequence)
	case loaderapi.OpRecall:
		a.Status, err = m.Recall(ctx, files[0])
	case loaderapi.OpCancel:
		a.Status, err = m.Cancel(ctx, r.Sequence)
	case loaderapi.OpBlockers:
		a.Blockers, err = m.Blockers(ctx)
	case loaderapi.OpTracers:
		a.Tracers, err = m.Tracers(ctx)
	case loaderapi.OpDisable:
		m.TakeOut()
		a.Status, err = m.Status(ctx)
	default:
		a.Status, err = m.Status(ctx)
	}
	_ = c.Answer(a, err) // the daemon may have been killed
}

// ShortDir is a folder whose name is short enough for sockets in it (unix(7):
// 108 bytes), unlike t.TempDir.
func ShortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "klatch") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// Away is an address where nobody listens.
func Away(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test
	return "https://" + l.Addr().String()
}
