// SPDX-License-Identifier: Apache-2.0

// Package source is the driver for hand-written livepatches: modules that
// somebody wrote in C with the kernel's livepatch API, because a fix needs
// callbacks or shadow variables. It compiles the module for a stock kernel,
// reads from the module's data what the kernel will be told, and lets nothing
// pass that livepatch.toml does not declare or that the kernel does not have.
//
// What it proves is less than objbuild does: that each replaced function is in
// the kernel, byte for byte what its source gives here, with the prototype of
// the new one. What the new one does is its author's word, and each result
// says so. Start reading at steps.
package source

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/build/module"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Driver builds in a cache folder. It may run several builds at a time.
type Driver struct {
	Cache   string        // holds kernels/ and objects/
	Timeout time.Duration // for one program; 0 means DefaultTimeout
	Limits  sandbox.Limits
}

// DefaultTimeout ends a program of a build that hangs. A module takes seconds.
const DefaultTimeout = 10 * time.Minute

// Version names the driver in a plan: a change of what it makes is another
// plan.
func Version() map[string]string { return map[string]string{"source": "1"} }

const vmlinux = "vmlinux" // the object name of the kernel itself

// job is one build on its way.
type job struct {
	*Driver
	plan    compose.Plan
	hand    *queue.Handwritten
	tree    kerneltree.Tree
	dir     string // result folder
	scratch string
	clock   *build.Clock
	result  build.Result

	compiler, config string // what objects in the cache depend on
	units            *kerneltree.Units
	originals        []*original
	ko               []byte // stripped
	file             *file  // the module with debug information
	tables           tables
}

// original is one file of the kernel's source with functions that are
// replaced.
type original struct {
	unit      kerneltree.Unit
	functions []queue.Replaced
	object    string // compiled unpatched
	info      functions
}

// Build implements build.Builder.
func (d *Driver) Build(ctx context.Context, p compose.Plan, dir string, clock *build.Clock) (build.Result, error) {
	j := &job{Driver: d, plan: p, hand: p.Handwritten, tree: kerneltree.At(d.Cache, p.Kernel), dir: dir, clock: clock,
		result: build.Result{Match: match.Empty()}}
	if j.hand == nil {
		return j.result, fault.New(fault.Internal, "wrong_driver", "the plan has no hand-written livepatch")
	}
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
	err = build.Walk(ctx, &j.result, j.steps())
	return j.result, err
}

// steps is the build. Each may refuse; then the later ones do not run.
func (j *job) steps() []func(context.Context) error {
	return []func(context.Context) error{
		j.accept,    // the plan
		j.know,      // the kernel build and its compiler
		j.find,      // the files that the replaced functions are in
		j.compile,   // the module
		j.read,      // what it tells the kernel
		j.originate, // compile the replaced functions' files, unpatched
		j.prove,     // that these functions are what the kernel runs
		j.compare,   // prototypes
		j.warn,
		j.finish,
	}
}

func (j *job) refuse(r build.Refusal) { j.result.Refusals = append(j.result.Refusals, r) }

// declaredFile and codeFiles are the places of refusals.
func declaredFile() string { return "source/" + queue.DeclaredName }

func (j *job) codeFiles() string {
	var names []string
	for _, f := range j.hand.Files {
		if filepath.Ext(f.Name) == ".c" {
			names = append(names, "source/"+f.Name)
		}
	}
	return strings.Join(names, ", ")
}

func (j *job) accept(context.Context) error {
	if n := len(j.plan.Patches); n > 0 {
		r := build.Refuse("mixed_queue", declaredFile())
		r.Detail = fmt.Sprintf("the queue of %s holds %d source patches too", j.plan.Kernel.Series, n)
		j.refuse(r)
	}
	j.result.Refusals = append(j.result.Refusals, module.CheckName(j.plan)...)
	return nil
}

func (j *job) know(ctx context.Context) error {
	var err error
	if j.units, err = j.tree.Units(); err != nil {
		return err
	}
	config, err := durable.ReadFile(filepath.Join(j.tree.Source(), ".config"), 4<<20)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(config)
	j.config = hex.EncodeToString(sum[:])
	cc := j.plan.Kernel.CC
	res, err := j.run(ctx, sandbox.Command{Argv: []string{cc, "--version"}})
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("exit status %d: %s", res.Exit, shorten(string(res.Output)))
	}
	if err != nil {
		return fault.New(fault.Internal, "no_compiler", "compiler %s of kernel %s: %w", cc, j.plan.Kernel.Release, err).
			WithHint("apt-get install %s", cc)
	}
	j.compiler, _, _ = strings.Cut(string(res.Output), "\n")
	return nil
}

// find looks which of the declared files the kernel was built from. A kernel
// that has none of them needs nothing; one that has only some cannot load the
// module.
func (j *job) find(context.Context) error {
	for _, fn := range j.hand.Functions {
		i := slices.IndexFunc(j.units.Of(fn.File), func(u kerneltree.Unit) bool { return u.Object == fn.Object })
		if i < 0 {
			if !slices.Contains(j.result.NotBuilt, fn.File) {
				j.result.NotBuilt = append(j.result.NotBuilt, fn.File)
			}
			continue
		}
		unit := j.units.Of(fn.File)[i]
		k := slices.IndexFunc(j.originals, func(o *original) bool { return o.unit == unit })
		if k < 0 {
			j.originals = append(j.originals, &original{unit: unit})
			k = len(j.originals) - 1
		}
		j.originals[k].functions = append(j.originals[k].functions, fn)
	}
	if len(j.originals) == 0 {
		j.result.Result = build.NotAffected
		return nil
	}
	for _, fn := range j.hand.Functions {
		if slices.Contains(j.result.NotBuilt, fn.File) {
			r := build.Refuse("not_built", fn.File)
			r.Function = fn.Name
			r.Detail = fmt.Sprintf("object %s of this kernel was not built from it, but the module replaces functions of other files too", fn.Object)
			j.refuse(r)
		}
	}
	return nil
}

func (j *job) finish(context.Context) error {
	for _, e := range j.tables.Functions {
		j.result.Functions = append(j.result.Functions, livepatch.Function{Object: e.Object, Name: e.Name})
	}
	slices.SortFunc(j.result.Functions, func(a, b livepatch.Function) int { return strings.Compare(a.String(), b.String()) })
	var err error
	j.result.Module, err = module.Keep(j.ko, j.plan, j.dir)
	return err
}

// run runs one program in the sandbox of this build.
func (j *job) run(ctx context.Context, c sandbox.Command) (sandbox.Result, error) {
	timeout := j.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c.Tree, c.Scratch, c.Dir, c.Limits = j.tree.Source(), j.scratch, j.tree.Source(), j.Limits
	root, err := kerneltree.RootOf(j.Cache, j.plan.Kernel)
	if err != nil {
		return sandbox.Result{}, err
	}
	c.Root, c.Visible = root.Dir, []string{filepath.Dir(j.scratch)}
	return sandbox.Run(ctx, c)
}

// make runs make on the tree with our scratch folder over it.
func (j *job) make(ctx context.Context, flags string, args ...string) (sandbox.Result, error) {
	if extra := j.plan.Kernel.ExtraCFlags; extra != "" {
		flags = extra + " " + flags
	}
	return j.run(ctx, sandbox.Command{Argv: kerneltree.Make(j.plan.Kernel, append(args, "KCFLAGS="+flags)...)})
}

// upper is where a file of the tree is found after a program wrote it.
func (j *job) upper(rel string) string { return sandbox.Command{Scratch: j.scratch}.Upper(rel) }

func shorten(s string) string {
	s = strings.TrimSpace(s)
	if len(s) > 2000 {
		s = s[:1000] + "\n…\n" + s[len(s)-1000:]
	}
	return s
}

// refuseShape tells what is about the module from what is our own trouble.
func (j *job) refuseShape(err error) error {
	shape, ok := errors.AsType[shapeError](err)
	if !ok {
		return err
	}
	r := build.Refuse("module_shape", j.codeFiles())
	r.Detail = shape.why
	j.refuse(r)
	return nil
}
