// SPDX-License-Identifier: Apache-2.0

// Package objbuild is the default driver: for a stock distribution kernel it
// compiles only the files that a fix reaches, unpatched and patched, proves
// with package match that the unpatched ones are what the kernel and its
// modules run, lets create-diff-object extract the changed functions, and
// links them into one livepatch with replace set.
//
// Start reading at steps. All foreign programs run in package sandbox.
package objbuild

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/build/module"
	"klatch/internal/forge/build/touch"
	"klatch/internal/forge/buildroot"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Driver builds in a cache folder. One may run several builds at a time; they
// share what was read of a kernel.
type Driver struct {
	Cache   string // holds kernels/ and objects/
	Tools   Tools
	Timeout time.Duration  // for one build; 0 means DefaultTimeout
	Limits  sandbox.Limits // of one build
	Fanout  int            // object files that headers may reach; 0 means DefaultFanout

	mu     sync.Mutex
	loaded map[string]*knowledge // by tree and compiler
}

// DefaultTimeout ends a build that hangs: a large object takes ten seconds on
// two cores, and a build may compile a few hundred, twice.
const DefaultTimeout = 2 * time.Hour

// DefaultFanout is how many object files a header may reach: an hour of
// compilation on two cores is more than anybody waits for one fix.
const DefaultFanout = 400

// knowledge is what was read of one kernel build.
type knowledge struct {
	units    *kerneltree.Units
	graphMu  sync.Mutex // the graph keeps what it parsed
	graph    *headers.Graph
	symbols  *touch.Symbols
	touch    *touch.Kernel
	compiler string
	config   string // digest
	// delayed: objtool runs on the linked kernel instead of on each object,
	// because the kernel has indirect branch tracking (IBT).
	delayed bool

	imageMu sync.Mutex
	images  map[string]*match.Image
	sealed  map[string]map[string]bool // functions without landing pad, by object
}

// job is one build on its way.
type job struct {
	*Driver
	*knowledge
	plan    compose.Plan
	tree    kerneltree.Tree
	dir     string // result folder
	scratch string
	root    buildroot.Root // empty: the host's
	clock   *build.Clock
	result  build.Result
	objects []*object
	touched map[string]string // file of the plan, to the digest of its patched text
	adds    map[string]bool   // files to which a patch adds an #include
	locals  []local           // types whose objects must not outlive a replaced function's call
}

// Build implements build.Builder.
func (d *Driver) Build(ctx context.Context, p compose.Plan, dir string, clock *build.Clock) (build.Result, error) {
	return d.run(ctx, p, dir, clock, true, nil)
}

// Check does all of a build but the link: Built says that the plan can be
// livepatched. It is safe for concurrent use.
func (d *Driver) Check(ctx context.Context, p compose.Plan, clock *build.Clock) (build.Result, error) {
	return d.run(ctx, p, "", clock, false, nil)
}

func (d *Driver) run(ctx context.Context, p compose.Plan, dir string, clock *build.Clock, link bool, look func(context.Context, *job) error) (build.Result, error) {
	ctx, cancel := d.limitTime(ctx)
	defer cancel()
	j := &job{Driver: d, plan: p, tree: kerneltree.At(d.Cache, p.Kernel), dir: dir, clock: clock,
		result: build.Result{Match: match.Empty()}}
	if !j.tree.Ready() {
		return j.result, fault.New(fault.NotFound, "no_tree", "kernel %s is not prepared in cache %s", p.Kernel.Release, d.Cache).
			WithHint("klatch-forge kernel add --release %s", p.Kernel.Release)
	}
	scratch, remove, err := build.Folder(d.Cache, p.Kernel.Release)
	if err != nil {
		return j.result, err
	}
	defer remove()
	j.scratch = filepath.Join(scratch, "overlay")
	if err := j.walk(ctx, link); err != nil || look == nil {
		return j.result, err
	}
	return j.result, look(ctx, j)
}

// walk goes through the steps until one refuses. Where nothing is linked it
// goes on with the objects that were not refused, so that one look finds the
// refusals of many.
func (j *job) walk(ctx context.Context, link bool) error {
	for i, step := range j.steps(link) {
		before := len(j.objects)
		told := len(j.result.Refusals)
		if err := step(ctx); err != nil {
			return err
		}
		if len(j.result.Refusals) > 0 {
			j.result.Result = build.Refused
			j.objects = slices.DeleteFunc(j.objects, func(o *object) bool { return o.refused })
			ofObjects := len(j.result.Refusals) == told || len(j.objects) < before
			if link || !ofObjects || len(j.objects) == 0 {
				return nil
			}
		}
		if i == 1 && len(j.objects) == 0 {
			j.result.Result = build.NotAffected
			return nil
		}
	}
	if len(j.result.Refusals) == 0 {
		j.result.Result = build.Built
	}
	return nil
}

// limitTime ends a build that takes too long.
func (d *Driver) limitTime(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := d.Timeout
	if limit == 0 {
		limit = DefaultTimeout
	}
	return context.WithTimeoutCause(ctx, limit, fault.New(fault.Unavailable, "time_limit", "the build takes longer than %s", limit).
		WithHint("give more with --timeout, if the fix is not hostile"))
}

// steps is the build. Each may refuse; then the later ones do not run.
func (j *job) steps(link bool) []func(context.Context) error {
	steps := []func(context.Context) error{
		j.know,            // the kernel build, its compiler and settings
		j.reach,           // object files that the patches reach
		j.compileOriginal, // unpatched, or from the cache
		j.dumpOriginal,    // what it exports
		j.apply,           // the patches
		j.compilePatched,
		j.differences, // what changed, besides functions
		j.prove,       // that the unpatched code is what the kernel runs
		j.extract,     // the changed functions
		j.confined,    // types that changed live in calls of these only
		j.review,      // warnings
	}
	if link {
		name := func(context.Context) error {
			j.result.Refusals = append(j.result.Refusals, module.CheckName(j.plan)...)
			return nil
		}
		steps = append(steps, name, j.link)
	}
	return steps
}

// refusal makes a refusal about an object, which is not looked at any more,
// with the touched files that it was reached through.
func (j *job) refusal(code fault.Code, o *object) build.Refusal {
	o.refused = true
	r := build.Refuse(code, o.unit.Source)
	for _, f := range j.plan.Files() {
		if f != o.unit.Source && slices.Contains(o.deps, f) {
			r.Through = append(r.Through, f)
		}
	}
	return r
}

func (j *job) refuse(r build.Refusal) { j.result.Refusals = append(j.result.Refusals, r) }

func (j *job) warn(r build.Refusal) { j.result.Warnings = append(j.result.Warnings, r) }

// run runs one program in the sandbox of this build.
func (j *job) run(ctx context.Context, c sandbox.Command) (sandbox.Result, error) {
	c.Tree, c.Scratch, c.Limits = j.tree.Source(), j.scratch, j.Limits
	if c.Root = j.root.Dir; c.Root != "" {
		objects := filepath.Join(j.Cache, "objects")
		for _, d := range []string{objects, filepath.Dir(j.scratch)} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return sandbox.Result{}, err
			}
		}
		c.Visible = []string{j.tree.Dir, objects, j.Tools.Dir, filepath.Dir(j.scratch)}
	}
	if c.Dir == "" {
		c.Dir = j.tree.Source()
	}
	if c.Env == nil {
		c.Env = sandbox.BaseEnv()
	}
	return sandbox.Run(ctx, c)
}

// make runs make on the tree with our scratch folder over it.
func (j *job) make(ctx context.Context, args ...string) (sandbox.Result, error) {
	if j.plan.Kernel.ExtraCFlags != "" {
		for i, a := range args {
			if flags, ok := strings.CutPrefix(a, "KCFLAGS="); ok {
				args[i] = "KCFLAGS=" + j.plan.Kernel.ExtraCFlags + " " + flags
			}
		}
	}
	if j.delayed {
		args = append(args, objtoolNow...)
	}
	return j.run(ctx, sandbox.Command{Argv: kerneltree.Make(j.plan.Kernel, args...)})
}

// objtoolNow makes objtool work on single objects in a kernel that delays it to
// the link of vmlinux (scripts/Makefile.lib): it writes no-ops for jump labels
// and the tables of special sections, without which neither the match proof nor
// the differ sees what the kernel runs. What it does for IBT alone needs the
// whole kernel and is left out: it makes a table of the functions that nobody
// calls by address, for the kernel to harden.
var objtoolNow = []string{"delay-objtool=", "objtool-args=$(filter-out --ibt,$(objtool-args-y)) $(if $(part-of-module),--module)"}

// upper is where a file of the tree is found after a program wrote it.
func (j *job) upper(rel string) string { return sandbox.Command{Scratch: j.scratch}.Upper(rel) }

// file is a file of the build's own, readable by the build user and seen at
// the same path from inside the sandbox.
func (j *job) file(parts ...string) string {
	return filepath.Join(append([]string{filepath.Dir(j.scratch)}, parts...)...)
}

func (j *job) write(file string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o644) //nolint:forbidigo // scratch
}

// image opens vmlinux or a module for comparison, once for all builds.
func (k *knowledge) image(t kerneltree.Tree, object string) (*match.Image, error) {
	k.imageMu.Lock()
	defer k.imageMu.Unlock()
	if im, ok := k.images[object]; ok {
		return im, nil
	}
	var im *match.Image
	var err error
	if object == vmlinux {
		im, err = match.Open(t.Vmlinux())
	} else {
		im, err = match.OpenModule(t.ModuleFile(object), object)
	}
	if err != nil {
		return nil, err
	}
	if len(k.images) > maxImages { // modules are small and quickly read again
		for n := range k.images {
			if n != vmlinux {
				delete(k.images, n)
				break
			}
		}
	}
	k.images[object] = im
	return im, nil
}

// maxImages bounds the memory for modules that are kept open: 32 of about 2 MiB.
const maxImages = 32

// vmlinux is the object name of the kernel itself.
const vmlinux = "vmlinux"

// functions are the functions replaced, in a stable order.
func (j *job) functions() []livepatch.Function {
	var out []livepatch.Function
	for _, o := range j.objects {
		out = append(out, o.changed...)
	}
	slices.SortFunc(out, func(a, b livepatch.Function) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

func shorten(b []byte) string {
	s := strings.TrimSpace(string(b))
	if len(s) > 2000 {
		s = s[:1000] + "\n…\n" + s[len(s)-1000:]
	}
	return s
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return !errors.Is(err, fs.ErrNotExist)
}
