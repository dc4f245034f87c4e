// SPDX-License-Identifier: Apache-2.0

// Package flood takes everything that changed between two uploads of a
// kernel's source and accounts for every CVE among it: one cumulative
// livepatch for those that can be livepatched, a reason for each of the rest.
//
// Nobody outside the upstream repository knows which hunk belongs to which
// CVE; records name files. So the unit is the file: a CVE counts as
// livepatched only if all that changed in its files, in this kernel build, is
// in the livepatch, together with what those changes need; or, where that is
// refused, if the words of its record name parts that are in and none that is
// not (parts.go). Start reading at Run: lots are tried together, and what is
// refused is found by trying again without it.
package flood

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
)

// Builder is what the flood needs of a driver. Both are safe for concurrent
// use.
type Builder interface {
	// Check does all of a build but the link.
	Check(ctx context.Context, p compose.Plan, clock *build.Clock) (build.Result, error)
	// Reach says which source files a plan reaches and what is refused
	// without compiling.
	Reach(ctx context.Context, p compose.Plan) (sources []string, refusals []build.Refusal, err error)
}

// Candidate is one CVE between the two uploads, with what policy says of it.
type Candidate struct {
	ID     cve.ID
	Files  []string // that its fix touches, as its record names them; none where nobody knows
	Wanted bool     // policy asks for a livepatch
	Reason string   // why it does, or does not
	Words  string   // title and description of its record
	Status Status   // where it does not: below_policy, unrated, not_affected or no_data
}

// Options of a run.
type Options struct {
	Kernel   catalog.Entry
	Base     []queue.Patch // the queue so far; the delta starts after it
	Tools    map[string]string
	Fanout   int   // source files that one lot may reach
	Batch    int   // source files that lots tried together may reach
	Parallel int   // lots tried alone at once
	Parts    bool  // try what is refused in parts, and believe the words of records
	State    State // what earlier runs found out
	Tell     func(format string, args ...any)
}

// Defaults of Options.
const (
	DefaultFanout = 400
	DefaultBatch  = 120
)

// lot is one smallest source patch: the hunks that some CVEs need.
type lot struct {
	nodes   nodes
	cves    []cve.ID
	sources []string // reached
	refused []build.Refusal
	inert   bool // no object code of this kernel build changes
	alone   bool // was tried alone

	files  map[cve.ID][]string // changed files that the record of each CVE names
	stands map[cve.ID]byWords  // of what is refused: CVEs that stand by their words
	starts nodes               // of a part: hunks that it was made for
	left   []string            // of a part: functions of its files that were refused
}

func (l *lot) name() string {
	if len(l.cves) == 0 {
		return "a part of " + strings.Join(l.starts.files(), ", ")
	}
	if len(l.cves) == 1 {
		return string(l.cves[0])
	}
	return fmt.Sprintf("%s and %d more", l.cves[0], len(l.cves)-1)
}

// runner is one run.
type runner struct {
	Options
	b      Builder
	delta  *Delta
	queued map[cve.ID]bool
	words  map[cve.ID]string
}

// Outcome is what a run found out.
type Outcome struct {
	Ledger  Ledger
	Patches []queue.Patch // for the queue, in order, each with its CVEs
}

// Run accounts for all candidates.
func Run(ctx context.Context, b Builder, d *Delta, all []Candidate, o Options) (Outcome, error) {
	o.Fanout = cmp.Or(o.Fanout, DefaultFanout)
	o.Batch = cmp.Or(o.Batch, DefaultBatch)
	o.Parallel = cmp.Or(o.Parallel, 1)
	if o.Tell == nil {
		o.Tell = func(string, ...any) {}
	}
	r := &runner{o, b, d, map[cve.ID]bool{}, map[cve.ID]string{}}
	for _, c := range all {
		r.words[c.ID] = c.Words
	}
	for _, p := range o.Base {
		for _, id := range p.Fixes {
			r.queued[id] = true
		}
	}
	ledger := newLedger(o.Kernel)
	lots, err := r.lots(ctx, all, &ledger)
	if err != nil {
		return Outcome{}, err
	}
	passed, err := r.together(ctx, lots)
	if err != nil {
		return Outcome{}, err
	}
	var parts []*lot
	if o.Parts {
		if parts, err = r.parts(ctx, lots); err != nil {
			return Outcome{}, err
		}
	}
	passed, err = r.settle(ctx, append(passed, parts...))
	if err != nil {
		return Outcome{}, err
	}
	for _, l := range lots {
		ledger.enter(l)
	}
	ledger.finish(all)
	patches, err := r.patches(ctx, passed)
	return Outcome{ledger, patches}, err
}

// lots groups the wanted candidates by the hunks that they need; candidates
// that need none are entered in the ledger.
func (r *runner) lots(ctx context.Context, all []Candidate, ledger *Ledger) ([]*lot, error) {
	byKey := map[string]*lot{}
	for _, c := range all {
		if r.queued[c.ID] {
			ledger.add(Entry{CVE: c.ID, Status: Livepatched, Reason: "it is in the queue already"})
			continue
		}
		if !c.Wanted {
			ledger.add(Entry{CVE: c.ID, Status: c.Status, Reason: c.Reason})
			continue
		}
		files, e := r.place(c)
		if e.Status != "" {
			ledger.add(e)
			continue
		}
		set := r.delta.closure(files)
		k := set.key()
		if byKey[k] == nil {
			byKey[k] = &lot{nodes: set, files: map[cve.ID][]string{}}
		}
		byKey[k].files[c.ID] = files
		byKey[k].cves = append(byKey[k].cves, c.ID)
	}
	var out []*lot
	for _, k := range sortedKeys(byKey) {
		l := byKey[k]
		slices.Sort(l.cves)
		out = append(out, l)
	}
	slices.SortStableFunc(out, func(a, b *lot) int {
		return cmp.Or(cmp.Compare(len(a.nodes), len(b.nodes)), cmp.Compare(a.cves[0], b.cves[0]))
	})
	reached := map[string]bool{}
	for i, l := range out {
		var err error
		if l.sources, l.refused, err = r.reach(ctx, l); err != nil {
			return nil, err
		}
		for _, s := range l.sources {
			reached[s] = true
		}
		if (i+1)%50 == 0 {
			r.Tell("%d of %d lots placed", i+1, len(out))
		}
	}
	r.Tell("%d lots of changes, in %d compiled source files", len(out), len(reached))
	return out, nil
}

// place finds the changed files of a candidate that this kernel build has, or
// the ledger's entry for one that has none.
func (r *runner) place(c Candidate) ([]string, Entry) {
	e := Entry{CVE: c.ID}
	if len(c.Files) == 0 {
		e.Status, e.Reason = NoData, "no source names the files of its fix"
		return nil, e
	}
	var files, elsewhere, lost []string
	for _, f := range c.Files {
		at := r.delta.find(f)
		switch {
		case at == "":
			lost = append(lost, f)
		case r.delta.added[at]:
			e.Status, e.Code, e.File = Refused, "file_added", at
			e.Reason = "its fix adds a file, which a source patch cannot"
			return nil, e
		case len(r.delta.reach[at]) == 0:
			elsewhere = append(elsewhere, at)
		default:
			files = append(files, at)
		}
	}
	switch {
	case len(files) > 0:
		return files, e
	case len(elsewhere) > 0:
		e.Status, e.Code = NotAffected, whyNotBuilt(elsewhere)
		e.Reason = "this kernel build has none of " + strings.Join(elsewhere, ", ")
	default:
		e.Status, e.Reason = NoData, "between the two sources nothing changes in "+strings.Join(lost, ", ")
	}
	return nil, e
}

// whyNotBuilt tells another architecture from the configuration.
func whyNotBuilt(files []string) fault.Code {
	for _, f := range files {
		rest, ok := strings.CutPrefix(f, "arch/")
		if !ok || strings.HasPrefix(rest, "x86/") {
			return "config"
		}
	}
	return "arch"
}

// reach asks what a lot reaches, or takes it from an earlier run.
func (r *runner) reach(ctx context.Context, l *lot) ([]string, []build.Refusal, error) {
	p, err := r.plan(ctx, l.nodes)
	if err != nil {
		return nil, nil, err
	}
	sources, refused, err := r.b.Reach(ctx, p)
	if err != nil {
		return nil, nil, fmt.Errorf("reach of %s: %w", l.name(), err)
	}
	own := map[string]bool{}
	for _, f := range l.nodes.files() {
		for _, s := range r.delta.reach[f] {
			own[s] = true
		}
	}
	sources = slices.DeleteFunc(sources, func(s string) bool { return !own[s] }) // the queue so far reaches others
	if len(refused) == 0 && len(sources) > r.Fanout {
		f := build.Refuse("header_fanout", l.nodes.files()[0])
		f.Detail = fmt.Sprintf("%d source files, limit %d", len(sources), r.Fanout)
		refused = append(refused, f)
	}
	return sources, refused, nil
}

// plan makes a plan of the queue so far and a set of hunks.
func (r *runner) plan(ctx context.Context, set nodes) (compose.Plan, error) {
	files := set.files()
	text, err := r.delta.diffOf(ctx, files, nil, set)
	if err != nil {
		return compose.Plan{}, err
	}
	patches := append(slices.Clone(r.Base), queue.Patch{Name: "delta", Diff: text, Files: files})
	return compose.New(r.Kernel, patches, r.Tools, 1)
}

// patches makes the source patches for the queue: lots that share files or
// CVEs become one, in a stable order.
func (r *runner) patches(ctx context.Context, passed []*lot) ([]queue.Patch, error) {
	var groups []*lot
	for _, l := range passed {
		g := &lot{nodes: nodes{}, cves: slices.Clone(l.cves), left: slices.Clone(l.left)}
		for n := range l.nodes {
			g.nodes[n] = true
		}
		var rest []*lot
		for _, o := range groups {
			if !share(g.nodes.files(), o.nodes.files()) && !slices.ContainsFunc(o.cves, func(id cve.ID) bool { return slices.Contains(g.cves, id) }) {
				rest = append(rest, o)
				continue
			}
			for n := range o.nodes {
				g.nodes[n] = true
			}
			g.cves = append(g.cves, o.cves...)
			g.left = append(g.left, o.left...)
		}
		groups = append(rest, g)
	}
	for _, g := range groups {
		slices.Sort(g.cves)
		g.cves = slices.Compact(g.cves)
		slices.Sort(g.left)
		g.left = slices.Compact(g.left)
	}
	slices.SortFunc(groups, func(a, b *lot) int { return cmp.Compare(a.cves[0], b.cves[0]) })
	var out []queue.Patch
	for _, g := range groups {
		files := g.nodes.files()
		text, err := r.delta.diffOf(ctx, files, nil, g.nodes)
		if err != nil {
			return nil, err
		}
		p := queue.Patch{Name: string(g.cves[0]), Fixes: g.cves, Diff: text, Files: files}
		if len(g.left) > 0 {
			p.Origin = "without " + strings.Join(g.left, ", ")
		}
		out = append(out, p)
	}
	return out, nil
}

func share(a, b []string) bool {
	return slices.ContainsFunc(a, func(f string) bool { _, ok := slices.BinarySearch(b, f); return ok })
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
