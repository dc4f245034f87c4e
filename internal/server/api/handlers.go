// SPDX-License-Identifier: Apache-2.0

package api

import (
	"cmp"
	"net/http"
	"strconv"
	"time"

	"klatch/internal/fault"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/enroll"
	"klatch/internal/server/ingest"
	"klatch/internal/server/repo"
	"klatch/internal/server/store"
	"klatch/internal/wire"
)

func (a *API) enroll(w http.ResponseWriter, r *http.Request) error {
	var q wire.EnrollRequest
	if err := read(r, &q); err != nil {
		return err
	}
	if err := ingest.ValidFacts(q.Facts); err != nil {
		return err
	}
	got, err := a.Enroller.Enroll(r.Context(), q)
	if err != nil {
		return err
	}
	return answer(w, got)
}

func (a *API) renew(w http.ResponseWriter, r *http.Request) error {
	var q wire.RenewRequest
	if err := read(r, &q); err != nil {
		return err
	}
	got, err := a.Enroller.Renew(machineID(r), q)
	if err != nil {
		return err
	}
	return answer(w, got)
}

func (a *API) join(w http.ResponseWriter, r *http.Request) error {
	var q wire.JoinRequest
	if err := read(r, &q); err != nil {
		return err
	}
	got, err := a.Enroller.Join(r.Context(), q)
	if err != nil {
		return err
	}
	return answer(w, got)
}

func (a *API) renewMirror(w http.ResponseWriter, r *http.Request) error {
	var q wire.RenewRequest
	if err := read(r, &q); err != nil {
		return err
	}
	got, err := a.Enroller.RenewMirror(machineID(r), q)
	if err != nil {
		return err
	}
	return answer(w, got)
}

func (a *API) check(w http.ResponseWriter, r *http.Request) error {
	var q wire.CheckRequest
	if err := read(r, &q); err != nil {
		return err
	}
	got, err := a.Ingester.Check(r.Context(), machineID(r), q)
	if err != nil {
		return err
	}
	return answer(w, got)
}

func (a *API) report(w http.ResponseWriter, r *http.Request) error {
	var q wire.Report
	if err := read(r, &q); err != nil {
		return err
	}
	if err := a.Ingester.Report(r.Context(), machineID(r), q); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *API) repository(w http.ResponseWriter, r *http.Request) error {
	a.Repo.Handler().ServeHTTP(w, r)
	return nil
}

func (a *API) page(w http.ResponseWriter, r *http.Request) error { return a.Pages.Index(w, r) }

func (a *API) style(w http.ResponseWriter, r *http.Request) error { return a.Pages.Style(w, r) }

func (a *API) machines(w http.ResponseWriter, r *http.Request) error {
	limit, err := number(r, "limit")
	if err != nil {
		return err
	}
	n := store.Clamp(int(min(limit, store.MaxPage)))
	list, err := a.Store.Machines(r.Context(), r.FormValue("after"), n)
	if err != nil {
		return err
	}
	page := adminapi.Machines{Version: adminapi.Version, Machines: []adminapi.Machine{}}
	for _, m := range list {
		page.Machines = append(page.Machines, adminMachine(m, a.Now()))
	}
	if len(list) == n {
		page.Next = list[n-1].ID
	}
	return answer(w, page)
}

func adminMachine(m store.Machine, now time.Time) adminapi.Machine {
	out := adminapi.Machine{ID: m.ID, Tier: m.Tier, Enrolled: m.Enrolled, LastSeen: m.LastSeen, Stale: now.Sub(m.LastSeen) > adminapi.StaleAfter}
	if m.Facts != (wire.Facts{}) {
		out.Facts = &m.Facts
	}
	if m.State.State != "" {
		out.State = &m.State
	}
	return out
}

func (a *API) livepatches(w http.ResponseWriter, _ *http.Request) error {
	c := a.Repo.Catalog()
	out := adminapi.Livepatches{Version: adminapi.Version, Publisher: c.Publisher, Metadata: c.Version, Problems: c.Problems, Livepatches: []adminapi.Livepatch{}, LeftOut: LeftOut(c.LeftOut)}
	if c.Version != 0 {
		out.Expires = &c.Expires
	}
	for _, e := range c.Entries {
		out.Livepatches = append(out.Livepatches, adminapi.Livepatch{
			Target: e.Target, Kernel: e.Kernel, Sequence: e.Sequence, Fixes: e.Fixes, Functions: e.Functions, Bytes: e.Bytes, SHA256: e.SHA256,
		})
	}
	return answer(w, out)
}

// LeftOut puts what a copy leaves out into words for programs.
func LeftOut(list []repo.LeftOut) []adminapi.LeftOut {
	out := make([]adminapi.LeftOut, 0, len(list))
	for _, l := range list {
		x := adminapi.LeftOut{Target: l.Target, Release: l.Kernel.Release, Sequence: l.Sequence, Why: string(l.Why), Until: l.Until}
		if !l.Kernel.ID.IsZero() {
			x.BuildID = l.Kernel.ID.String()
		}
		out = append(out, x)
	}
	return out
}

func (a *API) reports(w http.ResponseWriter, r *http.Request) error {
	limit, err := number(r, "limit")
	if err != nil {
		return err
	}
	before, err := number(r, "before")
	if err != nil {
		return err
	}
	n := store.Clamp(int(min(limit, store.MaxPage)))
	list, err := a.Store.Reports(r.Context(), r.FormValue("machine"), before, n)
	if err != nil {
		return err
	}
	page := adminapi.Reports{Version: adminapi.Version, Reports: []adminapi.Report{}}
	for _, s := range list {
		page.Reports = append(page.Reports, adminapi.Report{ID: s.ID, MachineID: s.MachineID, Received: s.Received, Report: s.Report})
	}
	if len(list) == n {
		page.Next = list[n-1].ID
	}
	return answer(w, page)
}

func (a *API) tokens(w http.ResponseWriter, r *http.Request) error {
	list, err := a.Store.Tokens(r.Context(), a.Now())
	if err != nil {
		return err
	}
	out := adminapi.Tokens{Version: adminapi.Version, Tokens: []adminapi.Token{}}
	for _, t := range list {
		out.Tokens = append(out.Tokens, adminToken(t))
	}
	return answer(w, out)
}

func adminToken(t store.Token) adminapi.Token {
	return adminapi.Token{Tier: t.Tier, Uses: t.Uses, Used: t.Used, Created: t.Created, Expires: t.Expires}
}

func (a *API) createToken(w http.ResponseWriter, r *http.Request) error {
	if err := jsonBody(r); err != nil {
		return err
	}
	var o adminapi.TokenOrder
	if err := read(r, &o); err != nil {
		return err
	}
	if o.Seconds < 0 || o.Seconds > int64(enroll.MaxExpiry/time.Second) {
		return fault.New(fault.Invalid, "bad_expiry", "token that expires after %d seconds: the longest is %s", o.Seconds, enroll.MaxExpiry)
	}
	if err := a.knownTier(cmp.Or(o.Tier, enroll.DefaultTier)); err != nil {
		return err
	}
	secret, t, err := a.Enroller.NewToken(r.Context(), enroll.Order{Uses: o.Uses, Expires: time.Duration(o.Seconds) * time.Second, Tier: o.Tier})
	if err != nil {
		return err
	}
	return answer(w, adminapi.TokenAnswer{Version: adminapi.Version, Secret: secret, Token: adminToken(t)})
}

func number(r *http.Request, name string) (int64, error) {
	text := r.FormValue(name)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fault.New(fault.Invalid, "bad_query", "%s=%.40q is not a number", name, text)
	}
	return n, nil
}
