// SPDX-License-Identifier: Apache-2.0

// Package api is the server's HTTP: the JSON of machines (package wire), the
// JSON of the fleet's operator (package adminapi), the repository's files and
// the page. It checks who asks and how much they send, and turns errors into
// problem documents; what the answers say is decided elsewhere. Start with
// Routes.
package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/obs"
	"klatch/internal/pki"
	"klatch/internal/server/enroll"
	"klatch/internal/server/ingest"
	"klatch/internal/server/repo"
	"klatch/internal/server/rolloutrepo"
	"klatch/internal/server/store"
	"klatch/internal/server/web"
	"klatch/internal/wire"
)

// API holds what the handlers need.
type API struct {
	CA       *pki.CA
	Enroller *enroll.Enroller
	Ingester *ingest.Ingester
	Store    store.Store
	Repo     *repo.Repo
	Rollout  *rolloutrepo.Repo // nil: this server has no operator's repository
	Pages    *web.Pages
	// AdminDigest is the SHA-256 of the admin token's text, in hexadecimal.
	AdminDigest string
	// Closed says whether the repository is for machines and mirrors of this
	// server only; nil: never.
	Closed func() bool
	Now    func() time.Time
	Log    *slog.Logger
}

// Fleet is the handler for machines: public and machine routes.
func (a *API) Fleet() http.Handler { return a.handler(Public, Machine, Mirror, Reader) }

// Admin is the handler for people. Requests that a foreign page makes a
// browser send are refused, because a browser adds the password by itself.
func (a *API) Admin() http.Handler {
	guard := http.NewCrossOriginProtection()
	guard.SetDenyHandler(a.wrap(Route{Access: Public, handle: func(*API, http.ResponseWriter, *http.Request) error {
		return fault.New(fault.Denied, "cross_origin", "the request comes from a foreign page")
	}}))
	return guard.Handler(a.handler(Admin))
}

func (a *API) handler(levels ...Access) http.Handler {
	mux := http.NewServeMux()
	for _, r := range Routes {
		for _, l := range levels {
			if r.Access == l {
				mux.Handle(r.Method+" "+r.Pattern, a.wrap(r))
			}
		}
	}
	mux.Handle("/", a.wrap(Route{Access: Public, handle: func(_ *API, _ http.ResponseWriter, r *http.Request) error {
		return fault.New(fault.NotFound, "no_route", "no %s %.200q here", r.Method, r.URL.Path)
	}}))
	return mux
}

// caller is who was let in.
type callerKey struct{}

func machineID(r *http.Request) string {
	id, _ := r.Context().Value(callerKey{}).(string) // empty for people
	return id
}

// errLogin makes a browser ask for the password.
var errLogin = errors.New("login")

// wrap lets in who may, and writes what goes wrong as a problem document.
func (a *API) wrap(route Route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := a.Now()
		rec := &recorder{ResponseWriter: w}
		err := a.serve(route, rec, r)
		if err != nil && rec.status == 0 {
			a.problem(rec, err)
		}
		level := slog.LevelDebug
		switch {
		case rec.status >= 500:
			level = slog.LevelError
		case rec.status >= 400 && rec.status != http.StatusNotFound:
			level = slog.LevelInfo
		}
		attrs := []slog.Attr{slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", rec.status),
			slog.Int64("bytes", rec.bytes), slog.Duration("took", a.Now().Sub(began)), slog.String("remote", r.RemoteAddr), obs.MachineID(rec.caller)}
		if err != nil {
			attrs = append(attrs, obs.Err(err))
		}
		a.Log.LogAttrs(r.Context(), level, "request", attrs...)
	})
}

func (a *API) serve(route Route, w *recorder, r *http.Request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic in %s %s: %v", route.Method, route.Pattern, p)
		}
	}()
	r.Body = http.MaxBytesReader(w, r.Body, max(route.limit, wire.MaxBody))
	switch route.Access {
	case Machine:
		id, err := a.CA.VerifyMachine(r.TLS, a.Now())
		if err != nil {
			return err
		}
		w.caller = id
		r = r.WithContext(context.WithValue(r.Context(), callerKey{}, id))
	case Mirror:
		id, err := a.mirror(r)
		if err != nil {
			return err
		}
		w.caller = id
		r = r.WithContext(context.WithValue(r.Context(), callerKey{}, id))
	case Reader:
		if w.caller, err = a.reader(r); err != nil {
			return err
		}
	case Admin:
		if !a.isAdmin(r) {
			return fault.New(fault.Denied, "login", "%w", errLogin).WithHint("the password is the admin token that klatch-server init showed; any user name does")
		}
	case Public:
	}
	return route.handle(a, w, r)
}

// mirror verifies a mirror's certificate and that it was not removed.
func (a *API) mirror(r *http.Request) (string, error) {
	id, err := a.CA.VerifyMirror(r.TLS, a.Now())
	if err != nil {
		return "", err
	}
	return id, a.Store.MirrorSeen(r.Context(), id, a.Now())
}

// reader says who reads the repository. Who claims to be a mirror must be one,
// also where anybody may read: a mirror that was removed, or whose certificate
// has expired, hears of it. Where anybody may read, the contact is noted once
// in each round, at the file that a round begins with.
func (a *API) reader(r *http.Request) (string, error) {
	closed := a.Closed != nil && a.Closed()
	if pki.SaysMirror(r.TLS) {
		if closed || r.URL.Path == "/metadata/timestamp.json" {
			return a.mirror(r)
		}
		return a.CA.VerifyMirror(r.TLS, a.Now())
	}
	if !closed {
		return "", nil
	}
	return a.CA.VerifyMachine(r.TLS, a.Now())
}

// isAdmin compares digests, in constant time.
func (a *API) isAdmin(r *http.Request) bool {
	secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		_, secret, ok = r.BasicAuth()
	}
	sum := sha256.Sum256([]byte(secret))
	return ok && len(a.AdminDigest) == hex.EncodedLen(len(sum)) && subtle.ConstantTimeCompare([]byte(hex.EncodeToString(sum[:])), []byte(a.AdminDigest)) == 1
}

// problem writes an error (RFC 9457). Of an internal one only the log tells
// more.
func (a *API) problem(w http.ResponseWriter, err error) {
	p := wire.Problem{Type: fault.KindOf(err), Title: err.Error(), Status: fault.HTTPStatus(err), Code: fault.CodeOf(err), Hint: fault.HintOf(err)}
	if p.Type == fault.Internal {
		p.Title, p.Code, p.Hint = "the server has a problem of its own", "", "its operator finds the reason in the server's log"
	}
	if errors.Is(err, errLogin) {
		p.Title, p.Status = "the admin token is needed", http.StatusUnauthorized
		w.Header().Set("WWW-Authenticate", `Basic realm="Klatch", charset="UTF-8"`)
	}
	b, err := json.Marshal(p)
	if err != nil {
		b = nil
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if p.Status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "60")
	}
	w.WriteHeader(p.Status)
	w.Write(b) //nolint:errcheck,gosec // the caller is gone
}

// read decodes a body. Unknown members are let through: a newer machine may
// say more than this server knows.
func read(r *http.Request, v any) error {
	b, err := io.ReadAll(r.Body)
	if big, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return fault.New(fault.Invalid, "body_too_large", "body is over %d bytes", big.Limit)
	}
	if err != nil {
		return fault.New(fault.Invalid, "bad_body", "read body: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(v); err != nil {
		// The cause may quote what it could not read, such as a token.
		if _, ours := errors.AsType[*fault.Error](err); ours {
			return err
		}
		return fault.New(fault.Invalid, "bad_body", "body is not the JSON that this path takes")
	}
	if d.More() {
		return fault.New(fault.Invalid, "bad_body", "bytes after the end of the body")
	}
	return nil
}

func answer(w http.ResponseWriter, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	_, err = w.Write(append(b, '\n'))
	return err
}

// jsonBody refuses what an HTML form could send.
func jsonBody(r *http.Request) error {
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return fault.New(fault.Invalid, "bad_body", "Content-Type is not application/json")
	}
	return nil
}

// recorder remembers status, size and caller for the log.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
	caller string
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(b)
	r.bytes += int64(n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
