// SPDX-License-Identifier: Apache-2.0

package api

import (
	"net/http"

	"klatch/internal/server/rolloutdraft"
)

// Access says who may use a route.
type Access string

// The levels. Public and machine routes are on the fleet's listener, admin
// routes on the admin's; no route is on both.
const (
	Public  Access = "public"  // anybody who reaches the listener
	Machine Access = "machine" // a machine with its certificate
	Mirror  Access = "mirror"  // a server below this one, with its certificate
	Reader  Access = "reader"  // anybody; on a closed server a machine or a mirror
	Admin   Access = "admin"   // the admin token
)

// Route is one row of the table.
type Route struct {
	Method  string
	Pattern string // as http.ServeMux reads it
	Access  Access
	handle  func(*API, http.ResponseWriter, *http.Request) error
	limit   int64 // of a body, in bytes; 0: wire.MaxBody
}

// Routes is every route there is. A test walks all of them at all levels.
var Routes = []Route{
	{"POST", "/v1/enroll", Public, (*API).enroll, 0},
	{"POST", "/v1/renew", Machine, (*API).renew, 0},
	{"POST", "/v1/check", Machine, (*API).check, 0},
	{"POST", "/v1/reports", Machine, (*API).report, 0},
	{"POST", "/v1/join", Public, (*API).join, 0},
	{"POST", "/v1/join/renew", Mirror, (*API).renewMirror, 0},
	{"GET", "/metadata/{file}", Reader, (*API).repository, 0},
	{"GET", "/targets/{path...}", Reader, (*API).repository, 0},
	{"GET", "/log/{path...}", Reader, (*API).repository, 0},
	{"GET", "/left-out.json", Reader, (*API).repository, 0},

	{"GET", "/rollout/metadata/{file}", Reader, (*API).rolloutFile, 0},
	{"GET", "/rollout/targets/{path...}", Reader, (*API).rolloutFile, 0},

	{"GET", "/{$}", Admin, (*API).page, 0},
	{"GET", "/style.css", Admin, (*API).style, 0},
	{"GET", "/api/v1/machines", Admin, (*API).machines, 0},
	{"GET", "/api/v1/livepatches", Admin, (*API).livepatches, 0},
	{"GET", "/api/v1/reports", Admin, (*API).reports, 0},
	{"GET", "/api/v1/tokens", Admin, (*API).tokens, 0},
	{"POST", "/api/v1/tokens", Admin, (*API).createToken, 0},
	{"GET", "/api/v1/rollout", Admin, (*API).rollout, 0},
	{"POST", "/api/v1/rollout/tiers", Admin, (*API).orderTiers, 0},
	{"POST", "/api/v1/rollout/promotions", Admin, (*API).promote, 0},
	{"POST", "/api/v1/rollout/holds", Admin, (*API).hold, 0},
	{"POST", "/api/v1/rollout/keys", Admin, (*API).orderKeys, 0},
	{"POST", "/api/v1/rollout/drafts", Admin, (*API).completeDraft, rolloutdraft.Max},
	{"GET", "/api/v1/audit", Admin, (*API).audit, 0},
}
