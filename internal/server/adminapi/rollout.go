// SPDX-License-Identifier: Apache-2.0

package adminapi

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"klatch/internal/rollout"
	"klatch/internal/server/audit"
)

// Tier is one tier as it is now, in the operator's order.
type Tier struct {
	Name      string              `json:"name"`
	SoakHours int                 `json:"soak_hours"`
	Hold      string              `json:"hold"` // reason; empty: not on hold
	Machines  int                 `json:"machines"`
	Selected  []rollout.Selection `json:"selected"`
	Waiting   []rollout.Selection `json:"waiting"` // what the tier before runs and nobody promoted to this one
	Soaking   []Soaking           `json:"soaking"` // promoted, not open yet
}

// Soaking is a promotion whose time has not come.
type Soaking struct {
	Target string    `json:"target"`
	Opens  time.Time `json:"opens"`
}

// Role is who signs one part of the operator's repository, and until when it
// is good.
type Role struct {
	Name      string    `json:"name"`
	Version   int64     `json:"metadata_version"`
	Expires   time.Time `json:"expires"`
	Threshold int       `json:"threshold"`
	Keys      []string  `json:"keys"` // ids
	Due       bool      `json:"due"`  // half of its life is over
}

// Rollout is the operator's repository.
type Rollout struct {
	Version  int             `json:"version"`
	Operator string          `json:"operator"`
	Profile  rollout.Profile `json:"profile"`
	Upstream string          `json:"upstream,omitempty"` // the server whose tiers these are; empty: this one's own
	Tiers    []Tier          `json:"tiers"`
	Roles    []Role          `json:"roles"`
}

// Ops of a TierOrder.
const (
	TierAdd    = "add"
	TierMove   = "move"
	TierSoak   = "soak"
	TierRemove = "remove"
)

// TierOrder changes the list of tiers.
type TierOrder struct {
	Op        string `json:"op"`
	Name      string `json:"name"`
	Place     int    `json:"place"` // of add and move; 1 is the first, 0 the end
	SoakHours int    `json:"soak_hours"`
	Force     bool   `json:"force"` // of remove: although machines are in it
	Reason    string `json:"reason"`
	By        string `json:"by"` // who says so; nobody checks that
}

// Promotion opens a tier for livepatches.
type Promotion struct {
	Tier    string   `json:"tier"`
	Targets []string `json:"targets"`
	All     bool     `json:"all"`
	Urgent  bool     `json:"urgent"`
	Reason  string   `json:"reason"`
	By      string   `json:"by"`
}

// Hold stops a tier, or without a reason lets it go on.
type Hold struct {
	Tier   string `json:"tier"`
	Reason string `json:"reason"`
	By     string `json:"by"`
}

// KeyOrder changes the keys of a role, or renews what people sign.
type KeyOrder struct {
	Renew     []string `json:"renew"` // roles
	Role      string   `json:"role"`
	Add       []string `json:"add"`    // public keys in PEM
	Remove    []string `json:"remove"` // key ids
	Threshold int      `json:"threshold"`
	Reason    string   `json:"reason"`
	By        string   `json:"by"`
}

// Completion brings a draft with its signatures into force.
type Completion struct {
	Draft json.RawMessage `json:"draft"`
	By    string          `json:"by"`
}

// RolloutAnswer is the outcome: in force, or a draft that people must sign.
type RolloutAnswer struct {
	Version int             `json:"version"`
	InForce bool            `json:"in_force"`
	Draft   json.RawMessage `json:"draft"` // null: in force
}

// Audit is the record of changes, newest first.
type Audit struct {
	Version int           `json:"version"`
	Broken  int           `json:"broken"` // lines that do not follow from the one before
	Entries []audit.Entry `json:"entries"`
}

// Rollout gets the operator's repository.
func (c *Client) Rollout(ctx context.Context) (r Rollout, err error) {
	return r, c.do(ctx, http.MethodGet, "/api/v1/rollout", nil, &r)
}

// OrderTiers changes the list of tiers.
func (c *Client) OrderTiers(ctx context.Context, o TierOrder) (a RolloutAnswer, err error) {
	return a, c.do(ctx, http.MethodPost, "/api/v1/rollout/tiers", o, &a)
}

// Promote opens a tier.
func (c *Client) Promote(ctx context.Context, o Promotion) (a RolloutAnswer, err error) {
	return a, c.do(ctx, http.MethodPost, "/api/v1/rollout/promotions", o, &a)
}

// Hold stops a tier or lets it go on.
func (c *Client) Hold(ctx context.Context, o Hold) (a RolloutAnswer, err error) {
	return a, c.do(ctx, http.MethodPost, "/api/v1/rollout/holds", o, &a)
}

// OrderKeys changes keys, or renews what people sign.
func (c *Client) OrderKeys(ctx context.Context, o KeyOrder) (a RolloutAnswer, err error) {
	return a, c.do(ctx, http.MethodPost, "/api/v1/rollout/keys", o, &a)
}

// Complete brings a draft into force.
func (c *Client) Complete(ctx context.Context, o Completion) (a RolloutAnswer, err error) {
	return a, c.do(ctx, http.MethodPost, "/api/v1/rollout/drafts", o, &a)
}

// Audit gets the newest entries of the record.
func (c *Client) Audit(ctx context.Context, limit int) (a Audit, err error) {
	return a, c.do(ctx, http.MethodGet, "/api/v1/audit?limit="+strconv.Itoa(limit), nil, &a)
}
