// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/delta"
	"klatch/internal/forge/build/match"
	"klatch/internal/livepatch"
)

// newImages makes the list of what is open for comparison.
func newImages() map[string]*match.Image { return map[string]*match.Image{} }

// differences finds what the patches change besides functions. A changed type
// is named first: where the compiler puts its size into data, that data
// changes because of it, and so does the version of each export that knows it.
func (j *job) differences(ctx context.Context) error {
	if err := j.compareExports(ctx); err != nil {
		return err
	}
	if err := j.compare(); err != nil {
		return err
	}
	others := j.result.Refusals
	j.result.Refusals = nil
	err := j.layouts(ctx)
	j.result.Refusals = append(j.result.Refusals, others...)
	return err
}

// compare finds what the patches change besides functions, before the differ
// is asked: its words are for its authors, and some of what it accepts would
// not work.
func (j *job) compare() error {
	done := j.clock.Step("compare", "compare both builds")
	defined := map[string][]string{} // by the patched objects, and for what
	deltas := make([]delta.Delta, len(j.objects))
	for i, o := range j.objects {
		before, err := durable.ReadFile(o.original, livepatch.MaxModule)
		if err != nil {
			return err
		}
		after, err := durable.ReadFile(o.patched, livepatch.MaxModule)
		if err != nil {
			return err
		}
		d, err := delta.Compare(before, after)
		if err != nil {
			return fmt.Errorf("compare %s: %w", o.unit.Target, err)
		}
		o.same = d.Empty()
		if err := j.branches(o, after); err != nil {
			return err
		}
		for _, n := range d.Defined {
			defined[n] = append(defined[n], o.unit.Object)
		}
		deltas[i] = d
	}
	changed := 0
	for i, d := range deltas {
		o := j.objects[i]
		if !o.same {
			changed++
		}
		for _, c := range d.Stopping {
			r := j.refusal(fault.Code(c.Kind), o)
			r.Function, r.Section, r.Detail = c.Name, c.Section, c.Why
			j.refuse(r)
		}
		for _, n := range d.Undefined {
			if err := j.usable(o, n, defined[n]); err != nil {
				return err
			}
		}
		for _, p := range d.Pointers {
			r := build.Refuse("new_pointer", o.unit.Source)
			r.Function, r.Detail = p.User, "the address of "+p.Function
			j.warn(r)
		}
		for _, f := range d.Frames {
			if f.New-f.Old >= largeFrame {
				r := build.Refuse("stack_grown", o.unit.Source)
				r.Function, r.Detail = f.Function, fmt.Sprintf("%d bytes, before %d", f.New, f.Old)
				j.warn(r)
			}
		}
	}
	done(fmt.Sprintf("%d changed", changed))
	return nil
}

// usable refuses a symbol that the new code of an object cannot refer to. New
// code of a module's part is not ready before that module is there.
func (j *job) usable(o *object, name string, defined []string) error {
	if slices.Contains(defined, o.unit.Object) || slices.Contains(defined, vmlinux) {
		return nil
	}
	code, owner, err := j.symbols.Use(o.unit.Object, name)
	if err != nil || code == "" {
		return err
	}
	if code == "symbol_missing" && len(defined) > 0 {
		code, owner = "needs_module", defined[0]
	}
	r := j.refusal(code, o)
	r.Function = name
	if owner != "" {
		r.Detail = fmt.Sprintf("%s is in module %s, which %s does not need", name, owner, o.unit.Object)
	}
	j.refuse(r)
	return nil
}

// largeFrame is a growth of the stack that a reviewer must see, in bytes; the
// kernel warns at 2048 for one frame (CONFIG_FRAME_WARN).
const largeFrame = 256

// prove compares the unpatched objects with the kernel. It comes before the
// differ, which would blame the fix for a wrong environment.
func (j *job) prove(ctx context.Context) error {
	done := j.clock.Step("match", "prove that the unpatched code is what the kernel runs")
	m := &j.result.Match
	for _, o := range j.objects {
		if o.same {
			continue
		}
		changed, err := match.Changed(o.original, o.patched)
		if err != nil {
			return err
		}
		if err := j.proveObject(ctx, o, changed); err != nil {
			return err
		}
	}
	done(fmt.Sprintf("%d of %d functions identical", m.Identical, m.Checked))
	return nil
}

// proveObject proves the functions of one object, or refuses. Those that
// differ are compared again as the distribution compiled them: in one section
// some jumps are written otherwise.
func (j *job) proveObject(ctx context.Context, o *object, functions []string) error {
	image, err := j.image(j.tree, o.unit.Object)
	if err != nil {
		return err
	}
	r := match.Empty()
	if err := image.Object(o.original, o.unit.Source, functions, &r); err != nil {
		return err
	}
	if slices.ContainsFunc(r.Different, func(d match.Difference) bool { return d.Replaced }) {
		file, err := j.shipped(ctx, o)
		if err != nil {
			return err
		}
		again := match.Empty()
		if err := image.Object(file, o.unit.Source, functions, &again); err != nil {
			return err
		}
		r = r.Better(again)
	}
	j.result.Match.Add(r)
	for _, d := range r.Different {
		if d.Replaced {
			j.refuseUnproved(o, d.Function, d.Why)
		}
	}
	return nil
}

// shipped compiles an unpatched object in the distribution's own way. The
// patches are applied by now, so it happens in a scratch folder of its own.
func (j *job) shipped(ctx context.Context, o *object) (string, error) {
	file := j.cached(o, flagsAsShipped)
	if exists(file) {
		return file, nil
	}
	clean := *j
	clean.scratch = j.file("unpatched")
	res, err := clean.make(ctx, "KCFLAGS="+flagsAsShipped, o.unit.Target)
	if err != nil {
		return "", err
	}
	b, err := durable.ReadFile(clean.upper(o.unit.Target), livepatch.MaxModule)
	if err != nil || res.Exit != 0 {
		return "", fault.New(fault.Internal, "compile", "compile %s unpatched: %s", o.unit.Source, strings.Join(complaintsOf(res.Output), "\n"))
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return "", err
	}
	return file, durable.WriteFile(file, b, 0o644)
}

func (j *job) refuseUnproved(o *object, function, why string) {
	r := j.refusal("match_failed", o)
	if env := j.result.Match.Environment; len(env) > 0 {
		r = j.refusal("wrong_environment", o)
		r.Hint = environmentHint(env)
	}
	r.Function, r.Detail = function, why
	j.refuse(r)
}

// onlyReplaced reduces the proof to the functions that the livepatch really
// replaces; one that was not compared yet is compared now.
func (j *job) onlyReplaced(ctx context.Context) error {
	m := &j.result.Match
	var proved []match.Proved
	for _, o := range j.objects {
		for _, f := range o.changed {
			is := func(p match.Proved) bool {
				return p.Object == o.unit.Object && p.File == o.unit.Source && p.Function == f.Name
			}
			i := slices.IndexFunc(m.Replaced, is)
			if i < 0 {
				if err := j.proveObject(ctx, o, []string{f.Name}); err != nil {
					return err
				}
				if i = slices.IndexFunc(m.Replaced, is); i < 0 {
					j.refuseUnproved(o, f.Name, "the function was not compared")
					continue
				}
			}
			proved = append(proved, m.Replaced[i])
		}
	}
	m.Replaced = proved
	return nil
}
