// SPDX-License-Identifier: Apache-2.0

package api

import "net/http"

// Access says who may use a route.
type Access string

// The levels. Public and machine routes are on the fleet's listener, admin
// routes on the admin's; no route is on both.
const (
	Public  Access = "public"  // anybody who reaches the listener
	Machine Access = "machine" // a machine with its certificate
	Admin   Access = "admin"   // the admin token
)

// Route is one row of the table.
type Route struct {
	Method  string
	Pattern string // as http.ServeMux reads it
	Access  Access
	handle  func(*API, http.ResponseWriter, *http.Request) error
}

// Routes is every route there is. A test walks all of them at all levels.
var Routes = []Route{
	{"POST", "/v1/enroll", Public, (*API).enroll},
	{"POST", "/v1/renew", Machine, (*API).renew},
	{"POST", "/v1/check", Machine, (*API).check},
	{"POST", "/v1/reports", Machine, (*API).report},
	{"GET", "/metadata/{file}", Public, (*API).repository},
	{"GET", "/targets/{path...}", Public, (*API).repository},
	{"GET", "/log/{path...}", Public, (*API).repository},

	{"GET", "/{$}", Admin, (*API).page},
	{"GET", "/style.css", Admin, (*API).style},
	{"GET", "/api/v1/machines", Admin, (*API).machines},
	{"GET", "/api/v1/livepatches", Admin, (*API).livepatches},
	{"GET", "/api/v1/reports", Admin, (*API).reports},
	{"GET", "/api/v1/tokens", Admin, (*API).tokens},
	{"POST", "/api/v1/tokens", Admin, (*API).createToken},
}
