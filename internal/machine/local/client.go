// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/url"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/wire"
)

// maxAnswer limits an answer, in bytes: two states with their fixes and
// blockers stay far below.
const maxAnswer = 8 << 20

// Client asks klatchd. What klatchd refuses comes back as its fault; a daemon
// that cannot be reached is Unavailable with code "daemon_unreachable".
type Client struct{ http *http.Client }

// Dial names the daemon behind a socket.
func Dial(path string) *Client {
	return &Client{&http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}}
}

// Status tells everything that can be told about the machine.
func (c *Client) Status(ctx context.Context) (s agent.Status, err error) {
	return s, c.ask(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// History is what the machine did, newest first.
func (c *Client) History(ctx context.Context) (h History, err error) {
	return h, c.ask(ctx, http.MethodGet, "/v1/history", nil, &h)
}

// Check makes one check at once.
func (c *Client) Check(ctx context.Context) (r Checked, err error) {
	return r, c.ask(ctx, http.MethodPost, "/v1/check", nil, &r)
}

// Retry lets the machine try again what failed or stalled.
func (c *Client) Retry(ctx context.Context) (r Checked, err error) {
	return r, c.ask(ctx, http.MethodPost, "/v1/retry", nil, &r)
}

// Resume ends a halt.
func (c *Client) Resume(ctx context.Context) (r Checked, err error) {
	return r, c.ask(ctx, http.MethodPost, "/v1/resume", nil, &r)
}

// Enroll exchanges a token for the machine's credential, which klatchd keeps.
func (c *Client) Enroll(ctx context.Context, q EnrollRequest) (id agent.Identity, err error) {
	return id, c.ask(ctx, http.MethodPost, "/v1/enroll", q, &id)
}

func (c *Client) ask(ctx context.Context, method, path string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://klatchd"+path, &body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if u, ok := errors.AsType[*url.Error](err); ok {
		return fault.New(fault.Unavailable, "daemon_unreachable", "ask klatchd: %w", u.Err).
			WithHint("see whether it runs: systemctl status klatchd")
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	b, err := durable.ReadLimited(resp.Body, "answer of klatchd", maxAnswer)
	if err != nil {
		return fault.New(fault.Unavailable, "daemon_unreachable", "%w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return parseProblem(b)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fault.New(fault.Internal, "answer_malformed", "read answer of klatchd: %w", err).
			WithHint("klatch and klatchd may be of different versions: klatch version")
	}
	return nil
}

func parseProblem(b []byte) error {
	var p wire.Problem
	if err := json.Unmarshal(b, &p); err != nil || fault.HTTPStatus(fault.New(p.Type, "", "")) == 0 {
		return fault.New(fault.Internal, "answer_malformed", "klatchd refused in words that this version does not know: %.200q", b)
	}
	e := fault.New(p.Type, p.Code, "%s", p.Title)
	e.Hint = p.Hint
	return e
}
