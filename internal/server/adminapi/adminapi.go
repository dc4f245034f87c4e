// SPDX-License-Identifier: Apache-2.0

// Package adminapi is the JSON between the server's admin listener and
// klatch-fleet, version 1, and its client. Fields are only added. Paths:
//
//	GET  /api/v1/machines?after=&limit=            Machines
//	GET  /api/v1/livepatches                       Livepatches
//	GET  /api/v1/reports?machine=&before=&limit=   Reports
//	GET  /api/v1/tokens                            Tokens
//	POST /api/v1/tokens   TokenOrder             → TokenAnswer
//	GET  /api/v1/rollout                           Rollout
//	POST /api/v1/rollout/tiers       TierOrder   → RolloutAnswer
//	POST /api/v1/rollout/promotions  Promotion   → RolloutAnswer
//	POST /api/v1/rollout/holds       Hold        → RolloutAnswer
//	POST /api/v1/rollout/keys        KeyOrder    → RolloutAnswer
//	POST /api/v1/rollout/drafts      Completion  → RolloutAnswer
//	GET  /api/v1/audit?limit=                      Audit
//
// All need the admin token, as bearer or as the password of basic
// authentication; errors are wire.Problem documents.
package adminapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/wire"
	"klatch/internal/wirecall"
)

// Version is in every answer.
const Version = 1

// StaleAfter is how long a machine may be silent before it is marked: three
// missed hourly checks.
const StaleAfter = 3 * time.Hour

// Machine is one machine.
type Machine struct {
	ID       string      `json:"machine_id"`
	Tier     string      `json:"tier"`
	Enrolled time.Time   `json:"enrolled"`
	LastSeen time.Time   `json:"last_seen"`
	Stale    bool        `json:"stale"`
	Facts    *wire.Facts `json:"facts"` // null: it said nothing yet
	State    *wire.State `json:"state"` // null: it said nothing yet
}

// Machines is one page of machines; Next goes into after, empty at the end.
type Machines struct {
	Version  int       `json:"version"`
	Machines []Machine `json:"machines"`
	Next     string    `json:"next"`
}

// Livepatch is one published livepatch.
type Livepatch struct {
	Target    string             `json:"target"`
	Kernel    kernel.Build       `json:"kernel"`
	Sequence  livepatch.Sequence `json:"sequence"`
	Fixes     []livepatch.Fix    `json:"fixes"`
	Functions int                `json:"functions"`
	Bytes     int64              `json:"bytes"`
	SHA256    string             `json:"sha256"`
}

// Livepatches is what the repository offers.
type Livepatches struct {
	Version     int         `json:"version"`
	Publisher   string      `json:"publisher"`
	Metadata    int64       `json:"metadata_version"`
	Expires     *time.Time  `json:"metadata_expires"` // null: nothing is published
	Problems    []string    `json:"problems"`
	Livepatches []Livepatch `json:"livepatches"`
	LeftOut     []LeftOut   `json:"left_out"`
}

// LeftOut is a signed livepatch that the server does not have on purpose. Why
// is "filter", "age", "age_unknown", "upstream" or "not_imported".
type LeftOut struct {
	Target   string             `json:"target"`
	Release  kernel.Release     `json:"kernel_release"`
	BuildID  string             `json:"build_id,omitempty"` // empty if the signed list tells none
	Sequence livepatch.Sequence `json:"sequence"`
	Why      string             `json:"why"`
	Until    time.Time          `json:"until,omitzero"` // for "age"
}

// Report is one report of a machine.
type Report struct {
	ID        int64       `json:"id"`
	MachineID string      `json:"machine_id"`
	Received  time.Time   `json:"received"`
	Report    wire.Report `json:"report"`
}

// Reports is one page, newest first; Next goes into before, 0 at the end.
type Reports struct {
	Version int      `json:"version"`
	Reports []Report `json:"reports"`
	Next    int64    `json:"next"`
}

// TokenOrder asks for a token; zero values are the server's defaults.
type TokenOrder struct {
	Uses    int    `json:"uses,omitempty"`
	Seconds int64  `json:"expires_seconds,omitempty"`
	Tier    string `json:"tier,omitempty"`
}

// Token is what is known of a token. Its secret is not.
type Token struct {
	Tier    string    `json:"tier"`
	Uses    int       `json:"uses"`
	Used    int       `json:"used"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// Tokens lists the tokens that can still be used.
type Tokens struct {
	Version int     `json:"version"`
	Tokens  []Token `json:"tokens"`
}

// TokenAnswer shows a new token, once.
type TokenAnswer struct {
	Version int        `json:"version"`
	Secret  wire.Token `json:"token"`
	Token
}

// maxAnswer limits an answer, in bytes: a page of machines with many fixes.
const maxAnswer = 64 << 20

// Client speaks to the admin listener.
type Client struct {
	BaseURL string
	Token   string
	HTTP    *http.Client
}

// Machines gets all machines, page by page.
func (c *Client) Machines(ctx context.Context) ([]Machine, error) {
	var all []Machine
	for after := ""; ; {
		var page Machines
		if err := c.do(ctx, http.MethodGet, "/api/v1/machines?after="+url.QueryEscape(after), nil, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Machines...)
		if after = page.Next; after == "" {
			return all, nil
		}
	}
}

// Livepatches gets what is published.
func (c *Client) Livepatches(ctx context.Context) (l Livepatches, err error) {
	return l, c.do(ctx, http.MethodGet, "/api/v1/livepatches", nil, &l)
}

// Reports gets the newest reports, of one machine or of all.
func (c *Client) Reports(ctx context.Context, machineID string, limit int) (r Reports, err error) {
	q := url.Values{"machine": {machineID}, "limit": {strconv.Itoa(limit)}}
	return r, c.do(ctx, http.MethodGet, "/api/v1/reports?"+q.Encode(), nil, &r)
}

// CreateToken makes an enrollment token.
func (c *Client) CreateToken(ctx context.Context, o TokenOrder) (a TokenAnswer, err error) {
	return a, c.do(ctx, http.MethodPost, "/api/v1/tokens", o, &a)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	q, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.BaseURL, "/")+path, body)
	if err != nil {
		return fault.New(fault.Invalid, "bad_url", "server address: %w", err)
	}
	q.Header.Set("Authorization", "Bearer "+c.Token)
	if in != nil {
		q.Header.Set("Content-Type", "application/json")
	}
	a, err := c.HTTP.Do(q)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		return fault.New(fault.Unavailable, "server_unreachable", "%s %s: %w", method, c.BaseURL, err).
			WithHint("is klatch-server running, and is this its admin address? (--server)")
	}
	defer a.Body.Close() //nolint:errcheck // read only
	b, err := durable.ReadLimited(a.Body, path, maxAnswer)
	if err != nil {
		return fault.New(fault.Unavailable, "server_unreachable", "%w", err)
	}
	if a.StatusCode >= 400 {
		return wirecall.Problem(c.BaseURL, a.StatusCode, b)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s %s: answer: %w", method, path, err)
	}
	return nil
}
