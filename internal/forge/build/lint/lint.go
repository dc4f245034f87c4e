// SPDX-License-Identifier: Apache-2.0

// Package lint looks at a queue of source patches as a build would, without
// compiling: in seconds it says what a build will surely refuse, what it will
// probably refuse, and what a reviewer must look at. It applies the patches to
// a scratch copy in the sandbox and reads names, attributes and makefiles; it
// cannot see what only the compiler knows. Start reading at Run.
package lint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/review"
	"klatch/internal/forge/build/touch"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
)

// Certainty is how sure a finding is.
type Certainty string

// The certainties.
const (
	Sure     Certainty = "sure"     // a build refuses this
	Probable Certainty = "probable" // a build refuses this unless the compiler says otherwise
	Look     Certainty = "look"     // a person must look at it; a build goes on
)

// Finding is one thing that lint found; codes are those of the catalog.
type Finding struct {
	Certainty Certainty  `json:"certainty"`
	Code      fault.Code `json:"code"`
	Patch     string     `json:"patch,omitempty"`
	File      string     `json:"file"`
	Function  string     `json:"function,omitempty"`
	Type      string     `json:"type,omitempty"`
	Rule      string     `json:"rule,omitempty"`
	Hint      string     `json:"hint,omitempty"`
	Detail    string     `json:"detail,omitempty"`
}

// Report is what lint found in a queue, for one kernel build.
type Report struct {
	Patches  int       `json:"patches"`
	NotBuilt []string  `json:"not_built"` // touched files that this kernel was not built from
	Objects  int       `json:"objects"`   // that a build would compile
	Findings []Finding `json:"findings"`
}

// Refused says whether a build will surely refuse the queue.
func (r Report) Refused() bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Certainty == Sure })
}

// run is one look at a queue.
type run struct {
	entry   catalog.Entry
	tree    kerneltree.Tree
	scratch string // folder of its own
	units   *kerneltree.Units
	graph   *headers.Graph
	symbols *touch.Symbols
	touch   *touch.Kernel
	report  Report
}

// Run looks at the patches in their order, for a kernel that is prepared in
// the cache. limit is how many object files headers may reach.
func Run(ctx context.Context, cache string, e catalog.Entry, patches []queue.Patch, limit int) (Report, error) {
	r := &run{entry: e, tree: kerneltree.At(cache, e), report: Report{Patches: len(patches), NotBuilt: []string{}, Findings: []Finding{}}}
	if !r.tree.Ready() {
		return r.report, fault.New(fault.NotFound, "no_tree", "kernel %s is not prepared in cache %s", e.Release, cache).
			WithHint("klatch-forge kernel add --release %s", e.Release)
	}
	if err := r.know(); err != nil {
		return r.report, err
	}
	if err := os.MkdirAll(filepath.Join(cache, "builds"), 0o755); err != nil {
		return r.report, err
	}
	scratch, err := os.MkdirTemp(filepath.Join(cache, "builds"), "lint-")
	if err != nil {
		return r.report, err
	}
	defer os.RemoveAll(scratch) //nolint:errcheck // scratch
	if err := os.Chmod(scratch, 0o755); err != nil {
		return r.report, err
	}
	r.scratch = scratch
	for i, p := range patches {
		if err := r.files(p); err != nil {
			return r.report, err
		}
		if err := r.apply(ctx, patches, i); err != nil {
			return r.report, err
		}
	}
	if err := r.reach(patches, limit); err != nil {
		return r.report, err
	}
	for _, f := range review.Look(r.tree.Source(), patches) {
		r.find(Finding{Certainty: Look, Code: f.Code, File: f.File, Function: f.Function, Detail: f.Detail})
	}
	slices.Sort(r.report.NotBuilt)
	r.report.NotBuilt = slices.Compact(r.report.NotBuilt)
	return r.report, nil
}

func (r *run) know() error {
	var err error
	if r.units, err = r.tree.Units(); err != nil {
		return err
	}
	var sources []string
	for _, u := range r.units.Units {
		if path.Ext(u.Source) == ".c" {
			sources = append(sources, u.Source)
		}
	}
	if r.graph, err = headers.Load(r.tree.Source(), filepath.Join(r.tree.Dir, "includes.json"), sources); err != nil {
		return err
	}
	if r.symbols, err = touch.ReadSymbols(r.tree); err != nil {
		return err
	}
	r.touch = &touch.Kernel{Tree: r.tree, Units: r.units, Includers: r.graph.Includers, Defines: r.symbols.Kernel}
	return nil
}

// find adds a finding once, with the rule and hint of its code.
func (r *run) find(f Finding) {
	i := slices.IndexFunc(build.Catalog, func(x build.Rule) bool { return x.Code == f.Code })
	if i >= 0 {
		full := build.Refuse(f.Code, f.File)
		f.Rule, f.Hint = full.Rule, full.Hint
	}
	if !slices.Contains(r.report.Findings, f) {
		r.report.Findings = append(r.report.Findings, f)
	}
}

// files looks at the names of the touched files, and at what the hunks lie in.
func (r *run) files(p queue.Patch) error {
	edits := queue.Edits(p.Diff)
	for _, f := range p.Files {
		code, err := r.touch.Of(f)
		if err != nil {
			return err
		}
		switch code {
		case "not_built":
			r.report.NotBuilt = append(r.report.NotBuilt, f)
			continue
		case "":
		default:
			r.find(Finding{Certainty: Sure, Code: code, Patch: p.Name, File: f})
			continue
		}
		old, err := r.current(f)
		if err != nil {
			return err
		}
		r.text(p.Name, f, old, edits[f])
	}
	return nil
}

const maxSource = 16 << 20 // bytes

// current is a file as the patches so far have left it.
func (r *run) current(f string) ([]string, error) {
	b, err := durable.ReadFile(r.command().Upper(f), maxSource)
	if errors.Is(err, fs.ErrNotExist) {
		b, err = durable.ReadFile(filepath.Join(r.tree.Source(), f), maxSource)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the patch will not apply
	}
	return strings.Split(string(b), "\n"), err
}

func (r *run) command() sandbox.Command {
	return sandbox.Command{Tree: r.tree.Source(), Scratch: filepath.Join(r.scratch, "overlay"), Dir: r.tree.Source()}
}

// apply applies a patch to the scratch copy and compares what is exported.
func (r *run) apply(ctx context.Context, patches []queue.Patch, i int) error {
	p := patches[i]
	before := map[string][]string{}
	for _, f := range p.Files {
		lines, err := r.current(f)
		if err != nil {
			return err
		}
		before[f] = lines
	}
	c := r.command()
	c.Argv, c.Stdin = queue.ApplyCommand(), bytes.NewReader(p.Diff)
	res, err := sandbox.Run(ctx, c)
	switch {
	case err != nil:
		return err
	case res.Exit == 1:
		f := Finding{Certainty: Sure, Code: "patch_does_not_apply", Patch: p.Name, File: strings.Join(p.Files, ", ")}
		rejects, err := durable.ReadFile(c.Upper(queue.Rejects), maxSource)
		if err != nil {
			return fmt.Errorf("rejected hunks of %s: %w", p.Name, err)
		}
		f.Detail = compose.Conflict(patches[:i], p, res.Output, rejects)
		r.find(f)
		return os.Remove(c.Upper(queue.Rejects))
	case res.Exit != 0:
		return fault.New(fault.Internal, "patch", "patch(1) ended with status %d: %s", res.Exit, res.Output)
	}
	for _, f := range p.Files {
		after, err := r.current(f)
		if err != nil {
			return err
		}
		if path.Ext(f) == ".c" && len(r.units.Of(f)) > 0 {
			r.exports(p.Name, f, before[f], after)
		}
	}
	return nil
}

// reach counts the object files that the queue reaches.
func (r *run) reach(patches []queue.Patch, limit int) error {
	units := map[string]bool{}
	var changes []headers.Change
	for _, p := range patches {
		for f, e := range queue.Edits(p.Diff) {
			code, err := r.touch.Of(f)
			if err != nil {
				return err
			}
			if code != "" {
				continue
			}
			if len(r.units.Of(f)) > 0 {
				units[f] = true
			}
			if in := r.graph.Includers(f); len(in) > 1 || len(in) == 1 && in[0] != f {
				c := headers.Change{File: f, Removed: e.Removed}
				for _, n := range e.Inserted {
					c.Inserted = append(c.Inserted, headers.Insertion(n))
				}
				changes = append(changes, c)
			}
		}
	}
	if len(changes) > 0 {
		reached, _, err := r.graph.Affected(changes)
		if err != nil {
			return err
		}
		if len(reached) > limit {
			var files []string
			for _, c := range changes {
				files = append(files, c.File)
			}
			slices.Sort(files)
			r.find(Finding{Certainty: Sure, Code: "header_fanout", File: strings.Join(slices.Compact(files), ", "),
				Detail: fmt.Sprintf("%d object files, limit %d", len(reached), limit)})
		}
		for _, u := range reached {
			units[u] = true
		}
	}
	for u := range units {
		r.report.Objects += len(r.units.Of(u))
	}
	return nil
}
