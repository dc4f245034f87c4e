// SPDX-License-Identifier: Apache-2.0

// Package wirecall asks a klatch-server: one request as JSON, one answer or a
// problem document (RFC 9457), which comes back as the fault that it tells of.
// It must not know who asks; credentials are in the HTTP client. Start with
// Caller.Post.
package wirecall

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/wire"
)

// Limit bounds one call; bodies are small.
const Limit = 30 * time.Second

// Caller is who asks.
type Caller struct {
	HTTP *http.Client
	// Again says what to do where the server's authority was replaced, such as
	// "enroll again".
	Again string
}

// Post sends one request to an address and reads the answer into out, which
// may be nil. Unavailable means that asking again later may help.
func (c Caller) Post(ctx context.Context, address string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, Limit)
	defer cancel()
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		return err
	}
	q.Header.Set("Content-Type", "application/json")
	a, err := c.HTTP.Do(q)
	if err != nil {
		return c.Explain(address, err)
	}
	defer a.Body.Close() //nolint:errcheck // read only
	b, err := durable.ReadLimited(a.Body, address, wire.MaxBody)
	if err != nil {
		return fault.New(fault.Unavailable, "server_unavailable", "%w", err)
	}
	if a.StatusCode/100 != 2 {
		return Problem(address, a.StatusCode, b)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return strange(fault.New(fault.Unavailable, "server_strange", "answer of %s is not what this version expects: %w", address, err))
	}
	return nil
}

// Problem reads an error answer. Something in between, such as a proxy, does
// not know our kinds; then the status decides.
func Problem(address string, status int, body []byte) error {
	var p wire.Problem
	if json.Unmarshal(body, &p) != nil || p.Title == "" || fault.HTTPStatus(fault.New(p.Type, "", "x")) == 0 {
		kind := fault.Internal
		switch {
		case status == http.StatusForbidden || status == http.StatusUnauthorized:
			kind = fault.Denied
		case status >= 500 || status == http.StatusTooManyRequests || status/100 == 3:
			kind = fault.Unavailable
		}
		return strange(fault.New(kind, "server_strange", "%s answers with status %d", address, status))
	}
	e := fault.New(p.Type, p.Code, "server: %.500s", p.Title)
	e.Hint = p.Hint
	return e
}

func strange(e *fault.Error) error {
	return e.WithHint("check that this is the address of a klatch-server, and not of something in between")
}

// Explain tells a server that is away from one that is not ours.
func (c Caller) Explain(address string, err error) error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f // of package pki: the wrong server
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // the address is in our text
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return fault.New(fault.Untrusted, "server_untrusted", "connect to %s: %w", address, err).
			WithHint("the server's certificate is not of the authority that was agreed on; if it was replaced, %s", c.Again)
	}
	return fault.New(fault.Unavailable, "server_unavailable", "connect to %s: %w", address, err).
		WithHint("check the network and the server; it is tried again by itself")
}
