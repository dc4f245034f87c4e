// SPDX-License-Identifier: Apache-2.0

// Package proof is the gate's test of one built livepatch on the kernel that
// it is for: it chooses the stories that it must go through, has each played on
// a machine of its own, a few at once, keeps what came out, and judges the whole.
//
// A finished transition is no proof of a fix: a half-imported one loads and
// does nothing. A fix without a check is called unchecked, and stays so down
// to the machines. Start reading with Run; what a story says is in package
// story, what its commands do in package player.
package proof

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/livepatch"
)

// ResultVersion is that of Result's JSON. Version 1 had one machine for all
// scenarios, and did not say which were required.
const ResultVersion = 2

// Scenario is one story and how it ended.
type Scenario struct {
	Name     string        `json:"name"`
	Proves   string        `json:"proves"`
	Verdict  lab.Verdict   `json:"verdict"`
	Why      string        `json:"why,omitempty"`
	Note     string        `json:"note,omitempty"` // what was found or counted
	Line     int           `json:"line,omitempty"` // of the story, that decided
	Seconds  float64       `json:"seconds"`
	Digest   string        `json:"digest"` // of all inputs
	Run      string        `json:"run"`    // what klatch-forge test --replay takes
	Required bool          `json:"required"`
	Rig      string        `json:"rig"`
	Hardware bool          `json:"hardware"`
	Finished time.Time     `json:"finished"`
	Checked  bool          `json:"checked"` // the checks showed the flaws, and then that they are gone
	Boot     float64       `json:"boot_seconds"`
	Steps    []player.Step `json:"steps"`
	Trouble  []lab.Trouble `json:"trouble"`
	Reused   bool          `json:"-"` // kept from an earlier run with the same inputs
}

// NotApplicable is a story that this livepatch does not need.
type NotApplicable struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Result is the outcome for one livepatch; its JSON is a promise, version 2.
type Result struct {
	Version       int                `json:"version"`
	Verdict       lab.Verdict        `json:"verdict"`
	Sequence      livepatch.Sequence `json:"sequence"`
	ModuleSHA256  string             `json:"module_sha256"`
	Kernel        string             `json:"kernel"`
	BuildID       string             `json:"build_id"`
	Required      []string           `json:"required"` // names of scenarios that must have passed
	NotApplicable []NotApplicable    `json:"not_applicable"`
	Scenarios     []Scenario         `json:"scenarios"`
	Fixes         []livepatch.Fix    `json:"fixes"`
	Trouble       []lab.Trouble      `json:"trouble"`
}

// Tables are the symbol tables that the builder counted positions in.
type Tables = player.Tables

// Trial is what is tried.
type Trial struct {
	Rig     lab.Rig
	Kernel  string // image to boot
	Built   build.Result
	Earlier []build.Result // that machines may have now
	Tables  Tables
	Checks  map[cve.ID][]byte // program per fix; a fix without one is unchecked
	Own     []Source          // the publisher's own stories

	Dir      string        // where runs are kept; empty: nowhere
	CPUs     int           // of a machine, where the story does not say; 0 means the rig's choice
	Busy     time.Duration // how long the busy machine is busy; 0 means player.DefaultBusy
	Parallel int           // machines at once; 0 means DefaultParallel
	Only     []string      // names of stories to play; empty means all that are required
	Again    bool          // plays also what was played with the same inputs

	// Tell is told when a story begins; done when it ends. May be called from several places at once.
	Tell func(what string) (done func(note string))
	// Hold is called after a story, before its machine is closed.
	Hold func(ctx context.Context, p *player.Player, m lab.Machine, s Scenario)
}

// DefaultParallel is as many machines as there are processors, within reason:
// an emulated machine keeps one busy most of the time.
func DefaultParallel() int { return min(max(runtime.NumCPU(), 1), 8) }

// Run plays all stories that the livepatch needs, and judges. An error is the
// lab's or ours, or an end before everything was played; what the livepatch did
// wrong is in the result. A run with Only is no whole: its result says nothing
// about the stories that it left out, and Keep refuses it.
func Run(ctx context.Context, t Trial) (Result, error) {
	var none Result
	plans, err := t.plan(ctx)
	if err != nil {
		return none, err
	}
	chosen, err := choose(plans, t.Only)
	if err != nil {
		return none, err
	}
	store, done, err := openStore(t.Dir)
	if err != nil {
		return none, err
	}
	defer done()
	scenarios, err := t.playAll(ctx, store, chosen)
	if err != nil {
		return none, err
	}
	return t.result(plans, scenarios), nil
}

// playAll plays a few stories at once, each on a machine of its own.
func (t Trial) playAll(ctx context.Context, st store, plans []plan) ([]Scenario, error) {
	scenarios, errs := make([]Scenario, len(plans)), make([]error, len(plans))
	atOnce := t.Parallel
	if atOnce <= 0 {
		atOnce = DefaultParallel()
	}
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, p := range plans {
		if kept, ok := st.kept(p); ok && !t.Again {
			kept.Required = p.required
			scenarios[i] = kept
			t.tell(p.name)(string(kept.Verdict) + ", as before")
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			errs[i] = interrupted(ctx, p.name)
			break
		}
		wg.Go(func() {
			defer func() { <-slots }()
			scenarios[i], errs[i] = t.play(ctx, st, p)
		})
	}
	wg.Wait()
	return scenarios, cmp.Or(errs...)
}

func (t Trial) tell(what string) (done func(note string)) {
	if t.Tell == nil {
		return func(string) {}
	}
	return t.Tell(what)
}

// play plays one story and keeps what came out. The inputs are on disk before,
// the outcome after.
func (t Trial) play(ctx context.Context, st store, p plan) (Scenario, error) {
	if err := st.begin(p); err != nil {
		return Scenario{}, err
	}
	return t.perform(ctx, p, func(s Scenario, console string) error { return st.end(p, s, console) })
}

// perform boots a machine and plays one story on it. The outcome is kept
// before somebody looks at the machine.
func (t Trial) perform(ctx context.Context, p plan, keep func(s Scenario, console string) error) (Scenario, error) {
	s := Scenario{Name: p.name, Proves: p.Story.Proves, Digest: p.digest, Run: p.run(), Required: p.required,
		Rig: p.inputs.Rig.name(), Hardware: p.inputs.Rig.Kind == lab.Hardware, Steps: []player.Step{}, Trouble: []lab.Trouble{}}
	pl, err := player.New(p.Play)
	if err != nil {
		return s, err
	}
	spec, err := pl.Spec(t.Kernel)
	if err != nil {
		return s, err
	}
	told := t.tell(p.name)
	start := time.Now()
	console := ""
	m, err := t.Rig.Boot(ctx, spec)
	s.Boot = time.Since(start).Seconds()
	if err != nil {
		s.Verdict, _ = lab.Judge(err, "")
		s.Why = err.Error()
	} else {
		defer m.Close() //nolint:errcheck // the result is known
		out := pl.Run(ctx, m)
		s.Verdict, s.Why, s.Line, s.Checked = out.Verdict, out.Why, out.Line, out.Checked
		s.Steps, s.Trouble, console = append(s.Steps, out.Steps...), append(s.Trouble, out.Trouble...), out.Console
		s.Note = notes(out.Steps)
	}
	s.Seconds, s.Finished = time.Since(start).Seconds(), time.Now().UTC().Truncate(time.Second)
	if ctx.Err() != nil { // what was stopped says nothing
		told("interrupted")
		return s, interrupted(ctx, p.name)
	}
	told(string(s.Verdict))
	if err := keep(s, console); err != nil {
		return s, err
	}
	if t.Hold != nil && m != nil {
		t.Hold(ctx, pl, m, s)
	}
	return s, nil
}

func interrupted(ctx context.Context, story string) error {
	return fault.New(fault.Unavailable, "interrupted", "interrupted at story %s: %w", story, context.Cause(ctx)).
		WithHint("run it again: it goes on with the stories that were not played to their end")
}

func notes(steps []player.Step) string {
	var all []string
	for _, s := range steps {
		if s.Note != "" && !slices.Contains(all, s.Note) {
			all = append(all, s.Note)
		}
	}
	return strings.Join(all, "; ")
}

// result judges the whole.
func (t Trial) result(plans []plan, scenarios []Scenario) Result {
	r := Result{Version: ResultVersion, Sequence: t.Built.Sequence, ModuleSHA256: t.Built.Module.SHA256, Kernel: string(t.Built.Kernel),
		BuildID: t.Built.BuildID.String(), Required: []string{}, NotApplicable: []NotApplicable{}, Scenarios: scenarios,
		Fixes: []livepatch.Fix{}, Trouble: []lab.Trouble{}}
	for _, p := range plans {
		switch {
		case p.lacks != "":
			r.NotApplicable = append(r.NotApplicable, NotApplicable{p.name, p.lacks})
		case p.required:
			r.Required = append(r.Required, p.name)
		}
	}
	r.settle(t.Built.Fixes, func(id cve.ID) bool { return t.Checks[id] != nil })
	return r
}

// settle derives from the scenarios what is said of the whole.
func (r *Result) settle(fixes []cve.ID, hasCheck func(cve.ID) bool) {
	r.Verdict = judge(r.Required, r.Scenarios)
	r.Trouble = []lab.Trouble{}
	for _, s := range r.Scenarios {
		r.Trouble = append(r.Trouble, s.Trouble...)
	}
	r.Fixes = []livepatch.Fix{}
	shown := slices.ContainsFunc(r.Scenarios, func(s Scenario) bool { return s.Checked && s.Verdict == lab.Pass })
	for _, id := range fixes {
		c := livepatch.Unchecked
		if hasCheck(id) && shown && r.Verdict == lab.Pass {
			c = livepatch.Passed
		}
		r.Fixes = append(r.Fixes, livepatch.Fix{CVE: id, Check: c})
	}
}

// judge is the verdict of the whole: any fail fails; a pass needs a pass of
// every required scenario, on every rig that played it. Nothing required is
// no pass.
func judge(required []string, scenarios []Scenario) lab.Verdict {
	verdict := lab.Pass
	passed := map[string]bool{}
	for _, s := range scenarios {
		switch s.Verdict {
		case lab.Pass:
			passed[s.Name] = true
		case lab.Fail:
			return lab.Fail
		default:
			verdict = lab.Broken
		}
	}
	missing := slices.ContainsFunc(required, func(name string) bool { return !passed[name] })
	if missing || len(required) == 0 {
		verdict = lab.Broken
	}
	return verdict
}

// openStore makes the folder of runs, or one that is thrown away.
func openStore(dir string) (store, func(), error) {
	if dir != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return store{}, nil, err
		}
		unlock, err := durable.Lock(dir + "/.lock")
		if err != nil {
			return store{}, nil, err
		}
		return store{dir}, func() { _ = unlock() }, nil
	}
	dir, err := os.MkdirTemp("", "klatch-proof-")
	if err != nil {
		return store{}, nil, fmt.Errorf("make a folder for runs: %w", err)
	}
	return store{dir}, func() { _ = os.RemoveAll(dir) }, nil
}

// Worst is the verdict of some scenarios by themselves.
func Worst(scenarios []Scenario) lab.Verdict {
	var names []string
	for _, s := range scenarios {
		names = append(names, s.Name)
	}
	return judge(names, scenarios)
}
