// SPDX-License-Identifier: Apache-2.0

// Package local is what klatchd says on this machine: HTTP with JSON on a Unix
// socket, and its client. Everybody may read; what changes something is for
// root, known by the credentials that the kernel gives for the peer of a
// socket (unix(7), SO_PEERCRED). It holds no secret and answers none.
//
// Start with routes: it is the whole API.
package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/wire"
)

// SocketPath is where klatchd listens; systemd owns the socket.
const SocketPath = "/run/klatch/klatchd.sock"

// maxRequest limits a request's body, in bytes; a token is the longest part.
const maxRequest = 16 << 10

// Daemon is what the API shows; agent.Agent is one.
type Daemon interface {
	Status(ctx context.Context) agent.Status
	History() []agent.Entry
	CheckNow(ctx context.Context) error
	Enroll(ctx context.Context, address string, token wire.Token) (agent.Identity, error)
	Retry(ctx context.Context) error
	Resume(ctx context.Context) error
}

// Level is who may use a route.
type Level int

// The levels.
const (
	Root    Level = iota // uid 0; the zero value, so that a route that says nothing is closed
	Anybody              // every user of the machine
)

// route is one line of the API.
type route struct {
	method, path string
	level        Level
	serve        func(d Daemon, r *http.Request) (any, error)
}

var routes = []route{
	{http.MethodGet, "/v1/status", Anybody, func(d Daemon, r *http.Request) (any, error) {
		return d.Status(r.Context()), nil
	}},
	{http.MethodGet, "/v1/history", Anybody, func(d Daemon, _ *http.Request) (any, error) {
		return History{Version: 1, Entries: d.History()}, nil
	}},
	{http.MethodPost, "/v1/check", Root, func(d Daemon, r *http.Request) (any, error) {
		before := d.Status(r.Context())
		err := d.CheckNow(r.Context())
		return Checked{Version: 1, Before: before, After: d.Status(r.Context())}, err
	}},
	{http.MethodPost, "/v1/enroll", Root, func(d Daemon, r *http.Request) (any, error) {
		q, err := parseEnroll(r.Body)
		if err != nil {
			return nil, err
		}
		return d.Enroll(r.Context(), q.Server, q.Token)
	}},
	{http.MethodPost, "/v1/retry", Root, func(d Daemon, r *http.Request) (any, error) {
		before := d.Status(r.Context())
		err := d.Retry(r.Context())
		return Checked{Version: 1, Before: before, After: d.Status(r.Context())}, err
	}},
	{http.MethodPost, "/v1/resume", Root, func(d Daemon, r *http.Request) (any, error) {
		before := d.Status(r.Context())
		err := d.Resume(r.Context())
		return Checked{Version: 1, Before: before, After: d.Status(r.Context())}, err
	}},
}

// History is the answer of /v1/history, newest first.
type History struct {
	Version int           `json:"version"`
	Entries []agent.Entry `json:"entries"`
}

// Checked is the answer of /v1/check, /v1/retry and /v1/resume.
type Checked struct {
	Version int          `json:"version"`
	Before  agent.Status `json:"before"`
	After   agent.Status `json:"after"`
}

// EnrollRequest is the body of /v1/enroll. The token is secret.
type EnrollRequest struct {
	Server string     `json:"server"`
	Token  wire.Token `json:"token"`
}

// LogValue keeps the token out of logs.
func (q EnrollRequest) LogValue() slog.Value { return slog.StringValue(q.Server) }

func parseEnroll(body io.Reader) (EnrollRequest, error) {
	var q EnrollRequest
	d := json.NewDecoder(body)
	d.DisallowUnknownFields()
	// The cause is left out: it may quote the token.
	err := d.Decode(&q)
	if _, end := d.Token(); err != nil || !errors.Is(end, io.EOF) {
		return q, fault.New(fault.Invalid, "request_malformed", "enroll request is not JSON with server and token")
	}
	if q.Server == "" || q.Token == "" {
		return q, fault.New(fault.Invalid, "request_malformed", "enroll request lacks server or token")
	}
	return q, nil
}

// peerKey is where the uid of a connection's peer is found.
type peerKey struct{}

// Serve answers on a Unix socket until ctx ends.
func Serve(ctx context.Context, l net.Listener, d Daemon, log *slog.Logger) error {
	s := &http.Server{
		Handler:           Handler(d, log),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, peer(c))
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
		defer cancel()
		_ = s.Shutdown(ending) // who is still connected is cut off below
		_ = s.Close()
	})
	defer stop()
	if err := s.Serve(&limited{Listener: l, open: map[uint32]int{}}); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// nobody is the uid of a peer that could not be found out (overflowuid).
const nobody = 65534

// peer asks the kernel who connected.
func peer(c net.Conn) uint32 {
	if counted, ok := c.(*counted); ok {
		return counted.uid
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nobody
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nobody
	}
	uid := uint32(nobody)
	err = raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	if err != nil {
		return nobody
	}
	return uid
}

// Handler serves the routes, each at its level.
func Handler(d Daemon, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	for _, r := range routes {
		mux.HandleFunc(r.method+" "+r.path, func(w http.ResponseWriter, q *http.Request) {
			uid, known := q.Context().Value(peerKey{}).(uint32)
			if r.level != Anybody && (!known || uid != 0) {
				answerProblem(w, fault.New(fault.Denied, "root_only", "%s %s is for root", r.method, r.path).WithHint("repeat it with sudo"))
				return
			}
			q.Body = http.MaxBytesReader(w, q.Body, maxRequest)
			v, err := r.serve(d, q)
			if err != nil {
				log.LogAttrs(q.Context(), slog.LevelInfo, "request refused", slog.String("path", r.path), slog.String("err", err.Error()))
				answerProblem(w, err)
				return
			}
			answer(w, http.StatusOK, "application/json", v)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, q *http.Request) {
		answerProblem(w, fault.New(fault.NotFound, "no_route", "klatchd has no %s %.100s", q.Method, q.URL.Path))
	})
	return mux
}

func answerProblem(w http.ResponseWriter, err error) {
	answer(w, fault.HTTPStatus(err), "application/problem+json", wire.Problem{
		Type: fault.KindOf(err), Title: err.Error(), Status: fault.HTTPStatus(err), Code: fault.CodeOf(err), Hint: fault.HintOf(err),
	})
}

func answer(w http.ResponseWriter, status int, form string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "encode answer: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", form)
	w.WriteHeader(status)
	_, _ = w.Write(append(bytes.TrimSpace(b), '\n')) // the peer may be gone
}
