// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/touch"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// object is one object file of the kernel on its way through the build.
type object struct {
	unit     kerneltree.Unit
	direct   bool     // a patch touches its own source file
	deps     []string // files that it is compiled from
	cmd      string   // command that compiles it, as make reads it
	original string   // file
	compared string   // what the differ gets for it
	patched  string
	exports  bool                 // symbols, for other objects and modules
	same     bool                 // patched and unpatched do the same
	refused  bool                 // it has a refusal
	changed  []livepatch.Function // that the livepatch replaces
}

// flat names the object in one word.
func (o *object) flat() string {
	return o.unit.Object + "_" + strings.ReplaceAll(o.unit.Target, "/", "_")
}

// know reads what is known of the kernel build, once for all builds.
func (j *job) know(ctx context.Context) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var err error
	if j.root, err = kerneltree.RootOf(j.Cache, j.plan.Kernel); err != nil {
		return err
	}
	key := strings.Join([]string{j.tree.Dir, j.root.Dir, j.plan.Kernel.CC}, "\x00")
	if k := j.loaded[key]; k != nil {
		j.knowledge = k
		return j.environment()
	}
	units, err := j.tree.Units()
	if err != nil {
		return err
	}
	var sources []string
	for _, u := range units.Units {
		if u.Source != "" && path.Ext(u.Source) == ".c" {
			sources = append(sources, u.Source)
		}
	}
	graph, err := headers.Load(j.tree.Source(), filepath.Join(j.tree.Dir, "includes.json"), sources)
	if err != nil {
		return err
	}
	k := &knowledge{units: units, graph: graph}
	j.knowledge = k
	k.images = newImages()
	if k.symbols, err = touch.ReadSymbols(j.tree); err != nil {
		return err
	}
	k.touch = &touch.Kernel{Tree: j.tree, Units: units, Includers: graph.Includers, Defines: k.symbols.Kernel}
	config, err := durable.ReadFile(filepath.Join(j.tree.Source(), ".config"), 4<<20)
	if err != nil {
		return err
	}
	k.delayed = bytes.Contains(config, []byte("\nCONFIG_X86_KERNEL_IBT=y\n"))
	sum := sha256.Sum256(config)
	k.config = hex.EncodeToString(sum[:])
	cc := j.plan.Kernel.CC
	res, err := j.run(ctx, sandbox.Command{Argv: []string{cc, "--version"}})
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("exit status %d: %s", res.Exit, shorten(res.Output))
	}
	if err != nil {
		return fault.New(fault.Internal, "no_compiler", "compiler %s of kernel %s: %w", cc, j.plan.Kernel.Release, err).
			WithHint("apt-get install %s", strings.TrimPrefix(cc, "x86_64-linux-gnu-"))
	}
	// "gcc-12 (Debian 12.2.0-14) 12.2.0"; the first word is how it was called.
	k.compiler, _, _ = strings.Cut(string(res.Output), "\n")
	if j.loaded == nil {
		j.loaded = map[string]*knowledge{}
	}
	j.loaded[key] = k
	return j.environment()
}

var includeLine = regexp.MustCompile(`^\s*#\s*include\b`)

// reach maps the touched files to object files and refuses what nobody can
// replace. Files that are not built are told; they are no reason to refuse.
func (j *job) reach(_ context.Context) error {
	done := j.clock.Step("reach", "find the object files that the fix reaches")
	direct, indirect := map[string]bool{}, map[string]bool{}
	var changes []headers.Change
	edits := map[string]headers.Change{}
	for _, p := range j.plan.Patches {
		for f, e := range queue.Edits(p.Diff) {
			c := edits[f]
			c.File, c.Removed = f, append(c.Removed, e.Removed...)
			for _, n := range e.Inserted {
				c.Inserted = append(c.Inserted, headers.Insertion(n))
				if slices.ContainsFunc(n.Lines, includeLine.MatchString) {
					if j.adds == nil {
						j.adds = map[string]bool{}
					}
					j.adds[f] = true
				}
			}
			edits[f] = c
		}
	}
	for _, f := range j.plan.Files() {
		code, err := j.touch.Of(f)
		if err != nil {
			return err
		}
		switch code {
		case "not_built":
			j.result.NotBuilt = append(j.result.NotBuilt, f)
			continue
		case "":
		default:
			j.refuse(build.Refuse(code, f))
			continue
		}
		direct[f] = len(j.units.Of(f)) > 0
		if includers := j.graph.Includers(f); len(includers) > 1 || len(includers) == 1 && includers[0] != f {
			changes = append(changes, edits[f])
		}
	}
	if len(j.result.Refusals) > 0 {
		return nil
	}
	note := ""
	if len(changes) > 0 {
		j.graphMu.Lock()
		reached, why, err := j.graph.Affected(changes)
		j.graphMu.Unlock()
		if err != nil {
			return err
		}
		note = ", headers reach " + why
		for _, u := range reached {
			indirect[u] = !direct[u]
		}
		limit := j.Fanout
		if limit == 0 {
			limit = DefaultFanout
		}
		if len(reached) > limit {
			var files []string
			for _, c := range changes {
				files = append(files, c.File)
			}
			r := build.Refuse("header_fanout", strings.Join(files, ", "))
			r.Detail = fmt.Sprintf("%d object files, limit %d", len(reached), limit)
			j.refuse(r)
			return nil
		}
	}
	for _, source := range slices.Sorted(keys(direct, indirect)) {
		for _, u := range j.units.Of(source) {
			j.objects = append(j.objects, &object{unit: u, direct: direct[source]})
		}
	}
	if len(j.objects) == 0 && len(changes) == 0 {
		for _, f := range j.result.NotBuilt {
			j.warn(build.Refuse("not_built", f))
		}
	}
	if len(j.objects) == 0 && len(changes) > 0 { // a header that nobody uses the changed part of
		j.refuse(build.Refuse("nothing_changed", strings.Join(j.plan.Files(), ", ")))
	}
	done(fmt.Sprintf("%d%s", len(j.objects), note))
	return nil
}

func keys(ms ...map[string]bool) func(func(string) bool) {
	return func(yield func(string) bool) {
		seen := map[string]bool{}
		for _, m := range ms {
			for k, v := range m {
				if v && !seen[k] {
					seen[k] = true
					if !yield(k) {
						return
					}
				}
			}
		}
	}
}

// Reach says which source files a plan reaches, sorted, without compiling
// anything; refusals are those that need no compiler.
func (d *Driver) Reach(ctx context.Context, p compose.Plan) (sources []string, refusals []build.Refusal, err error) {
	j := &job{Driver: d, plan: p, tree: kerneltree.At(d.Cache, p.Kernel), scratch: filepath.Join(d.Cache, "builds", "none"),
		clock: build.NewClock(nil)}
	if err := j.know(ctx); err != nil {
		return nil, nil, err
	}
	if err := j.reach(ctx); err != nil {
		return nil, nil, err
	}
	for _, o := range j.objects {
		sources = append(sources, o.unit.Source)
	}
	return slices.Compact(sources), j.result.Refusals, nil
}

// Objects lists what a source file is a part of in a kernel build: vmlinux or
// modules by name, sorted; for a header, all that include it. Empty means that
// this kernel build does not have it.
func (d *Driver) Objects(ctx context.Context, p catalog.Entry, file string) ([]string, error) {
	j := &job{Driver: d, tree: kerneltree.At(d.Cache, p), scratch: filepath.Join(d.Cache, "builds", "none")}
	j.plan.Kernel = p
	if err := j.know(ctx); err != nil {
		return nil, err
	}
	var out []string
	for _, u := range append(j.graph.Includers(file), file) {
		for _, n := range j.units.Of(u) {
			out = append(out, n.Object)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}
