// SPDX-License-Identifier: Apache-2.0

package klpbuild

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/review"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
)

// reach sorts the touched files and refuses what klp-build does not take
// (check_unsupported_patches in the script, and what is no code). Files that
// the kernel is not built from are told; they are no reason to refuse.
func (j *job) reach(context.Context) error {
	done := j.clock.Step("reach", "look what the kernel is built from")
	b, err := durable.ReadFile(j.tree.Sources(), 64<<20)
	if err != nil {
		return err
	}
	sources := strings.Split(strings.TrimSpace(string(b)), "\n") // sorted
	affected := false
	for _, f := range j.plan.Files() {
		_, builtFrom := slices.BinarySearch(sources, f)
		folder := func(name string) bool { return strings.Contains("/"+path.Dir(f)+"/", "/"+name+"/") }
		switch {
		case strings.HasPrefix(f, "arch/x86/boot/"), strings.HasPrefix(f, "arch/x86/purgatory/"): // klp-build does not build these
			j.refuse(build.Refuse("boot_image", f))
		case !builtFrom && code(f):
			j.result.NotBuilt = append(j.result.NotBuilt, f)
		case folder("vdso"), folder("realmode"):
			j.refuse(build.Refuse("boot_image", f))
		case path.Ext(f) == ".S":
			j.refuse(build.Refuse("assembly", f))
		case path.Ext(f) != ".c" && path.Ext(f) != ".h":
			j.refuse(build.Refuse("not_code", f))
		case strings.HasPrefix(f, "lib/"):
			j.refuse(build.Refuse("lib_code", f))
		default:
			affected = true
		}
	}
	if len(j.result.Refusals) == 0 && !affected {
		for _, f := range j.result.NotBuilt {
			j.warn(build.Refuse("not_built", f))
		}
		j.result.Result = build.NotAffected
	}
	done("")
	return nil
}

// code says whether a file is one that could have been compiled or included.
func code(f string) bool {
	switch path.Ext(f) {
	case ".c", ".h", ".S", ".inc":
		return true
	}
	return strings.HasPrefix(f, "Documentation/") || strings.HasPrefix(f, "tools/") || strings.HasPrefix(f, "samples/")
}

// apply applies the source patches in order and makes one diff of them.
// klp-build takes several, but applies each to the untouched source once: two
// that touch the same lines would not do. Files that the kernel is not built
// from are left out.
func (j *job) apply(ctx context.Context) error {
	done := j.clock.Step("apply", fmt.Sprintf("apply %d source patch(es)", len(j.plan.Patches)))
	scratch := filepath.Join(j.folder, "apply")
	for _, p := range j.plan.Patches {
		res, err := j.run(ctx, scratch, sandbox.Command{Stdin: bytes.NewReader(p.Diff),
			Argv: []string{"patch", "-p1", "--unified", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=-"}})
		if err != nil {
			return err
		}
		switch res.Exit {
		case 0:
		case 1: // some hunks cannot be applied (patch(1), EXIT STATUS); anything else is trouble of our own
			r := build.Refuse("patch_does_not_apply", strings.Join(p.Files, ", "))
			r.Rule = fmt.Sprintf("%s; source patch %s does not", r.Rule, p.Name)
			r.Detail = shorten(res.Output)
			j.refuse(r)
			return nil
		default:
			return fault.New(fault.Internal, "patch", "patch(1) ended with status %d: %s", res.Exit, shorten(res.Output))
		}
	}
	patched := filepath.Join(j.folder, "patched")
	for _, f := range j.plan.Files() {
		if slices.Contains(j.result.NotBuilt, f) {
			continue
		}
		b, err := durable.ReadFile(upper(scratch, f), 16<<20)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(patched, path.Dir(f)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(patched, f), b, 0o644); err != nil { //nolint:forbidigo // scratch
			return err
		}
		diff, err := queue.Change(ctx, j.tree.Source(), patched, []string{f}, nil)
		if fault.KindOf(err) == fault.NotFound {
			continue // one source patch took back what another did
		}
		if err != nil {
			return err
		}
		j.diff = append(j.diff, diff...)
	}
	if len(j.diff) == 0 {
		j.refuse(build.Refuse("nothing_changed", strings.Join(j.plan.Files(), ", ")))
	}
	done("")
	return nil
}

// review adds warnings for what a person must look at.
func (j *job) review(context.Context) error {
	for _, f := range review.Look(j.tree.Source(), j.plan.Patches) {
		r := build.Refuse(f.Code, f.File)
		r.Function, r.Detail = f.Function, f.Detail
		j.warn(r)
	}
	return nil
}
