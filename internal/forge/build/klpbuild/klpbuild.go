// SPDX-License-Identifier: Apache-2.0

// Package klpbuild is the driver for kernels that somebody built himself, from
// a source that has scripts/livepatch/klp-build (Linux 6.19 and newer). The
// kernel's own script builds the whole kernel once, unpatched, and afterwards
// only what a fix touches; objtool extracts the changed functions. Package
// match proves that the unpatched build is the kernel that runs.
//
// Start reading at steps. All foreign programs run in package sandbox.
package klpbuild

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/build/module"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Name is the driver's name in a catalog entry.
const Name = "klpbuild"

// Driver builds in a cache folder.
type Driver struct {
	Cache   string        // holds kernels/
	Timeout time.Duration // for one run of klp-build with a fix; 0 means DefaultTimeout
	Limits  sandbox.Limits
	// CCache is the ccache folder of the owner's own build, or empty. Prepare
	// reads it and nothing writes to it: builds share no objects through it.
	CCache string
}

// DefaultTimeout ends a build that hangs. A fix of one file takes half a
// minute on two cores; a header may reach the whole kernel.
const DefaultTimeout = 4 * time.Hour

// script is klp-build in a kernel's source.
const script = "scripts/livepatch/klp-build"

// job is one build on its way.
type job struct {
	*Driver
	plan    compose.Plan
	tree    kerneltree.Tree
	units   *kerneltree.Units
	dir     string // result folder
	folder  string // of this build's own; scratch lies in it
	scratch string // laid over the tree
	clock   *build.Clock
	result  build.Result
	images  map[string]*match.Image

	diff    []byte   // all source patches as one
	said    []byte   // by klp-build
	exit    int      // its status
	reached []object // compiled again, and changed
	module  []byte
	patch   contents // what the module says
}

// Tools names the tools in a plan: the kernel brings its own.
func Tools(cache string, e catalog.Entry) (map[string]string, error) {
	tools := map[string]string{Name: "1"}
	for _, f := range []string{script, "scripts/livepatch/init.c"} {
		b, err := durable.ReadFile(filepath.Join(kerneltree.At(cache, e).Source(), f), 1<<20)
		if err != nil {
			return nil, fault.New(fault.NotFound, "no_tree", "source of kernel %s in cache %s: %w", e.Release, cache, err).
				WithHint("klatch-forge kernel add --tree DIR --config FILE --vmlinux FILE")
		}
		sum := sha256.Sum256(b)
		tools[f] = "sha256 " + hex.EncodeToString(sum[:])
	}
	return tools, nil
}

// Build implements build.Builder.
func (d *Driver) Build(ctx context.Context, p compose.Plan, dir string, clock *build.Clock) (build.Result, error) {
	j := &job{Driver: d, plan: p, tree: kerneltree.At(d.Cache, p.Kernel), dir: dir, clock: clock,
		result: build.Result{Match: match.Empty()}, images: map[string]*match.Image{}}
	if j.result.Refusals = module.CheckName(p); len(j.result.Refusals) > 0 {
		j.result.Result = build.Refused
		return j.result, nil
	}
	if !j.tree.Ready() {
		return j.result, fault.New(fault.NotFound, "no_tree", "kernel %s is not prepared in cache %s", p.Kernel.Release, d.Cache).
			WithHint("klatch-forge kernel add --tree DIR --config FILE --vmlinux FILE")
	}
	folder, remove, err := build.Folder(d.Cache, p.Kernel.Release)
	if err != nil {
		return j.result, err
	}
	defer remove()
	j.folder, j.scratch = folder, filepath.Join(folder, "overlay")
	err = build.Walk(ctx, &j.result, j.steps())
	return j.result, err
}

// steps is the build. Each may refuse; then the later ones do not run.
func (j *job) steps() []func(context.Context) error {
	return []func(context.Context) error{
		j.know,     // the kernel build and its compiler
		j.reach,    // which of the touched files it is built from
		j.apply,    // the source patches, as one
		j.klpBuild, // the kernel's own script
		j.compare,  // what changed, besides functions
		j.judge,    // how klp-build ended
		j.prove,    // that the unpatched code is what the kernel runs
		j.review,   // warnings
		j.keep,     // the module, after a last look
	}
}

func (j *job) refuse(r build.Refusal) { j.result.Refusals = append(j.result.Refusals, r) }

func (j *job) warn(r build.Refusal) { j.result.Warnings = append(j.result.Warnings, r) }

// run runs one program on the tree, with a scratch folder over it.
func (j *job) run(ctx context.Context, scratch string, c sandbox.Command) (sandbox.Result, error) {
	timeout := j.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c.Tree, c.Scratch, c.Dir, c.Env, c.Limits = j.tree.Source(), scratch, j.tree.Source(), environment(j.plan.Kernel), j.Limits
	return sandbox.Run(ctx, c)
}

// upper is where a file of the tree is found after a program wrote it.
func upper(scratch, rel string) string { return sandbox.Command{Scratch: scratch}.Upper(rel) }

// environment gives klp-build, which calls make without arguments, the
// kernel's compiler and release.
func environment(e catalog.Entry) []string {
	return append(sandbox.BaseEnv(), "MAKEFLAGS=CC="+e.CC+" HOSTCC="+e.CC+" KERNELRELEASE="+string(e.Release))
}

// know reads what is known of the kernel build, and whether the compiler is
// still the one that the original was built with.
func (j *job) know(ctx context.Context) error {
	var err error
	if j.units, err = j.tree.Units(); err != nil {
		return err
	}
	e := j.plan.Kernel
	res, err := j.run(ctx, j.scratch, sandbox.Command{Argv: []string{e.CC, "--version"}})
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("exit status %d: %s", res.Exit, shorten(res.Output))
	}
	if err != nil {
		return fault.New(fault.Internal, "no_compiler", "compiler %s of kernel %s: %w", e.CC, e.Release, err).WithHint("apt-get install %s", e.CC)
	}
	have, _, _ := strings.Cut(string(res.Output), "\n")
	if afterName(have) != afterName(e.Compiler) {
		s := match.Setting{Aspect: "compiler", Want: e.Compiler, Have: have}
		j.result.Match.Environment = append(j.result.Match.Environment, s)
		r := build.Refuse("wrong_environment", strings.Join(j.plan.Files(), ", "))
		r.Hint = fmt.Sprintf("wrong environment: %s is %s, the kernel's is %s", s.Aspect, s.Have, s.Want)
		j.refuse(r)
	}
	return nil
}

func afterName(version string) string {
	_, rest, _ := strings.Cut(version, " ")
	return rest
}

// keep looks at the finished module and writes it into the result folder.
func (j *job) keep(context.Context) error {
	err := j.inspect()
	if err != nil || len(j.result.Refusals) > 0 {
		return err
	}
	if j.result.Module, err = module.Keep(j.module, j.plan, j.dir); err != nil {
		return err
	}
	j.result.Functions = j.patch.functions()
	return nil
}

// read reads a file that the build user wrote: perhaps a link, or without end.
func read(file string) ([]byte, error) { return durable.ReadFile(file, livepatch.MaxModule) }

func regular(file string) bool {
	st, err := os.Lstat(file)
	return err == nil && st.Mode().IsRegular()
}

func shorten(b []byte) string {
	s := strings.TrimSpace(string(b))
	if len(s) > 2000 {
		s = s[:1000] + "\n…\n" + s[len(s)-1000:]
	}
	return s
}
