// SPDX-License-Identifier: Apache-2.0

// Package web is the page that a person looks at: server-rendered HTML, no
// script. It reads the same store methods as the API and decides nothing.
// Start with Index.
package web

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/repo"
	"klatch/internal/server/store"
	"klatch/internal/wire"
)

//go:embed templates/index.html
var indexHTML string

//go:embed static/style.css
var styleCSS []byte

var index = template.Must(template.New("index").Parse(indexHTML))

// maxMachines limits the page; the API lists all.
const maxMachines = store.MaxPage

// Pages renders.
type Pages struct {
	Machines store.Machines
	Catalog  func() *repo.Catalog
	Now      func() time.Time
	Version  string // of this program
}

// Style is the style sheet.
func (p *Pages) Style(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "text/css; charset=utf-8")
	w.Header().Set("Cache-Control", "max-age=300")
	_, err := w.Write(styleCSS)
	return err
}

// Index is the first page.
func (p *Pages) Index(w http.ResponseWriter, r *http.Request) error {
	v, err := p.view(r.Context())
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := index.Execute(&b, v); err != nil {
		return fmt.Errorf("render page: %w", err)
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	_, err = w.Write(b.Bytes())
	return err
}

// Mood groups states for the eye. A state that this server does not know is
// shown as one that needs a person.
type Mood string

// The moods, those that need a person first.
const (
	Act    Mood = "act"
	Moving Mood = "moving"
	Plain  Mood = "plain"
	Good   Mood = "good"
)

var order = []Mood{Act, Moving, Plain, Good}

// moods follows docs/reference/states.md.
var moods = map[string]Mood{
	"confirmed":     Good,
	"idle_current":  Plain,
	"no_livepatch":  Plain,
	"staged":        Moving,
	"loading":       Moving,
	"transitioning": Moving,
	"soaking":       Moving,
}

type view struct {
	Now        string
	Version    string
	Publisher  string
	Machines   []machine
	More       bool
	Patched    int
	Act        int
	Stale      int
	Fixes      int
	Unchecked  int
	Livepatch  []published
	Warnings   []warning
	HasCatalog bool
}

type warning struct{ Text, Next string }

type machine struct {
	ID, Hostname, Tier string
	Kernel, Build      string
	Sequence, Newest   livepatch.Sequence
	Behind             bool
	Fixes              []livepatch.Fix
	Mood, Row          Mood // of the state alone; of the whole row
	State, Reason      string
	Text, Next         string
	Advice             string
	AdviceReasons      string
	Newer              string
	SeenAgo, SeenAt    string
	Stale              bool
}

type published struct {
	Kernel, Build string
	Sequence      livepatch.Sequence
	Newest        bool
	Fixes         []livepatch.Fix
	Functions     int
	Size          string
	Machines      int
}

func (p *Pages) view(ctx context.Context) (view, error) {
	now := p.Now()
	c := p.Catalog()
	v := view{Now: stamp(now), Version: p.Version, Publisher: c.Publisher, HasCatalog: c.Version != 0}
	list, err := p.Machines.Machines(ctx, "", maxMachines)
	if err != nil {
		return v, err
	}
	v.More = len(list) == maxMachines
	newest := map[kernel.BuildID]livepatch.Sequence{}
	for _, e := range c.Entries {
		newest[e.Kernel.ID] = max(newest[e.Kernel.ID], e.Sequence)
	}
	live := map[cve.ID]livepatch.Check{}
	users := map[kernel.BuildID]map[livepatch.Sequence]int{}
	for _, m := range list {
		row := rowOf(m, newest, now)
		v.Machines = append(v.Machines, row)
		for _, f := range row.Fixes {
			if live[f.CVE] != livepatch.Passed {
				live[f.CVE] = f.Check
			}
		}
		if row.Sequence > 0 {
			v.Patched++
			if users[m.Facts.Kernel.ID] == nil {
				users[m.Facts.Kernel.ID] = map[livepatch.Sequence]int{}
			}
			users[m.Facts.Kernel.ID][row.Sequence]++
		}
		if row.Row == Act {
			v.Act++
		}
		if row.Stale {
			v.Stale++
		}
	}
	v.Fixes = len(live)
	for _, check := range live {
		if check != livepatch.Passed {
			v.Unchecked++
		}
	}
	slices.SortStableFunc(v.Machines, func(a, b machine) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), strings.Compare(a.Hostname, b.Hostname), strings.Compare(a.ID, b.ID))
	})
	for _, e := range c.Entries {
		v.Livepatch = append(v.Livepatch, published{
			Kernel: string(e.Kernel.Release), Build: e.Kernel.ID.Short(), Sequence: e.Sequence, Newest: e.Sequence == newest[e.Kernel.ID],
			Fixes: e.Fixes, Functions: e.Functions, Size: size(e.Bytes), Machines: users[e.Kernel.ID][e.Sequence],
		})
	}
	v.Warnings = warnings(c, now)
	return v, nil
}

func rowOf(m store.Machine, newest map[kernel.BuildID]livepatch.Sequence, now time.Time) machine {
	k := m.Facts.Kernel
	row := machine{
		ID: m.ID, Hostname: m.Facts.Hostname, Tier: m.Tier, Kernel: string(k.Release), Build: k.ID.Short(),
		Sequence: m.State.Sequence, Newest: newest[k.ID], Fixes: m.State.Fixes,
		State: words(m.State.State), Reason: string(m.State.Reason), Text: m.State.Text, Next: m.State.NextStep,
		Advice: m.State.Advice, Newer: string(m.Facts.Newer),
		SeenAgo: ago(now.Sub(m.LastSeen)), SeenAt: stamp(m.LastSeen), Stale: now.Sub(m.LastSeen) > adminapi.StaleAfter,
	}
	row.Behind = row.Newest > row.Sequence
	for i, r := range m.State.Reasons {
		if i > 0 {
			row.AdviceReasons += ", "
		}
		row.AdviceReasons += words(string(r))
	}
	switch {
	case m.State.State == "":
		row.State, row.Mood, row.Text, row.Next = "enrolled", Moving, "The machine has a credential and has said nothing else yet.", "wait for its first check, or run on it: klatch check"
	case moods[m.State.State] == "":
		row.Mood = Act
	default:
		row.Mood = moods[m.State.State]
	}
	// "none; wait" is written for a terminal; here it is enough to wait.
	row.Next = strings.TrimPrefix(strings.TrimPrefix(row.Next, "none; "), "or ")
	if row.Next == "none" {
		row.Next = ""
	}
	if row.Row = row.Mood; row.Advice == "required" {
		row.Row = Act
	}
	if m.Facts == (wire.Facts{}) {
		row.Hostname, row.Kernel, row.Build = m.ID, "not known yet", ""
	}
	return row
}

// rank orders rows: those that need a person, those that say nothing, the
// rest.
func (m machine) rank() int {
	r := 2 * slices.Index(order, m.Row)
	if m.Stale {
		r = min(r, 1)
	}
	return r
}

func warnings(c *repo.Catalog, now time.Time) (list []warning) {
	switch left := c.Expires.Sub(now); {
	case c.Version == 0:
	case left <= 0:
		list = append(list, warning{
			fmt.Sprintf("The publisher's metadata expired %s, at %s. Machines keep what they run and take nothing new.", ago(-left), stamp(c.Expires)),
			"let the publisher sign again, then: klatch-server sync --from SOURCE",
		})
	case left < 12*time.Hour:
		list = append(list, warning{
			fmt.Sprintf("The publisher's metadata expires in %s, at %s.", about(left), stamp(c.Expires)),
			"let the publisher sign again, then: klatch-server sync --from SOURCE",
		})
	}
	for _, p := range c.Problems {
		list = append(list, warning{"A published file is damaged here: " + p, "copy it again: klatch-server sync --from SOURCE"})
	}
	if n := len(c.LeftOut); n > 0 {
		list = append(list, warning{fmt.Sprintf("%d signed livepatches are left out here; their machines are told so.", n), "see which and why: klatch-server status"})
	}
	return list
}

// words makes a stored word readable: idle_current is "idle, current" to
// nobody, but underscores need not be seen.
func words(s string) string { return strings.ReplaceAll(s, "_", " ") }

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

func ago(d time.Duration) string {
	if d < 5*time.Second {
		return "just now"
	}
	return about(d) + " ago"
}

// about is a time span in its largest unit.
func about(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func size(n int64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%d B", n)
	case n < 1<<20:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
