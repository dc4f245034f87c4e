// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
)

// objectsData changes when what is kept in the cache does.
const objectsData = "source/1"

// originate compiles the files of the replaced functions as they are, for the
// match proof and for their prototypes. They are kept in the cache, because
// they do not depend on the livepatch.
func (j *job) originate(ctx context.Context) error {
	done := j.clock.Step("compile_original", fmt.Sprintf("compile %d file(s) unpatched", len(j.originals)))
	var missing []*original
	for _, o := range j.originals {
		sum := sha256.Sum256([]byte(strings.Join([]string{objectsData, string(j.plan.Kernel.Release), j.plan.Kernel.SourceV,
			j.plan.Kernel.BuildID.String(), j.config, j.plan.Kernel.CC, j.compiler, j.plan.Kernel.ExtraCFlags, debugFlags, o.unit.Target}, "\x00")))
		key := hex.EncodeToString(sum[:])
		o.object = filepath.Join(j.Cache, "objects", key[:2], key+".o")
		if _, err := os.Stat(o.object); err != nil {
			missing = append(missing, o)
		}
	}
	if len(missing) > 0 {
		var args []string
		for _, o := range missing {
			args = append(args, o.unit.Target)
		}
		slices.Sort(args)
		res, err := j.make(ctx, debugFlags, slices.Compact(args)...)
		if err != nil {
			return err
		}
		for _, o := range missing {
			b, err := durable.ReadFile(j.upper(o.unit.Target), livepatch.MaxModule)
			if err != nil || res.Exit != 0 {
				return fault.New(fault.Internal, "compile", "compile %s unpatched: %s", o.unit.Source, shorten(string(res.Output)))
			}
			if err := os.MkdirAll(filepath.Dir(o.object), 0o755); err != nil {
				return err
			}
			if err := durable.WriteFile(o.object, b, 0o644); err != nil {
				return err
			}
		}
	}
	done(fmt.Sprintf("%d reused", len(j.originals)-len(missing)))
	return nil
}

// prove compares the functions that are replaced with the kernel's, and looks
// where they lie: there, ftrace must be able to redirect them.
func (j *job) prove(context.Context) error {
	done := j.clock.Step("match", "prove that the replaced functions are what the kernel runs")
	for _, o := range j.originals {
		image, err := j.open(o.unit.Object)
		if err != nil {
			return err
		}
		var there []queue.Replaced
		var names []string
		for _, f := range o.functions {
			if clones := image.Names(f.Name); !slices.Contains(clones, f.Name) {
				r := build.Refuse("no_such_function", o.unit.Source)
				r.Function, r.Detail = f.Name, fmt.Sprintf("%s has no function %s", o.unit.Object, f.Name)
				if len(clones) > 0 {
					r.Detail += ", only " + strings.Join(clones, ", ")
				}
				j.refuse(r)
				continue
			}
			there, names = append(there, f), append(names, f.Name)
		}
		r := match.Empty()
		if err := image.Object(o.object, o.unit.Source, names, &r); err != nil {
			return err
		}
		for _, d := range r.Different {
			if d.Replaced {
				j.refuseUnproved(d)
			}
		}
		for i := range r.Replaced {
			f := there[slices.Index(names, r.Replaced[i].Function)]
			if err := j.locate(image, o, f, &r.Replaced[i]); err != nil {
				return err
			}
		}
		m := &j.result.Match
		m.Checked += r.Checked
		m.Identical += r.Identical
		m.Different = append(m.Different, r.Different...)
		m.Replaced = append(m.Replaced, r.Replaced...)
	}
	done(fmt.Sprintf("%d of %d functions identical", j.result.Match.Identical, j.result.Match.Checked))
	return nil
}

func (j *job) open(object string) (*match.Image, error) {
	if object == vmlinux {
		return match.Open(j.tree.Vmlinux())
	}
	return match.OpenModule(j.tree.ModuleFile(object), object)
}

func (j *job) refuseUnproved(d match.Difference) {
	r := build.Refuse("match_failed", d.File)
	if e := j.plan.Kernel; e.SourceV != e.Version || e.ExtraCFlags != "" || afterWord(j.compiler) != afterWord(e.Compiler) {
		r = build.Refuse("wrong_environment", d.File)
	}
	r.Function, r.Detail = d.Function, d.Why
	j.refuse(r)
}

// afterWord leaves out the first word of a compiler's version: how it was called.
func afterWord(version string) string {
	_, rest, _ := strings.Cut(version, " ")
	return rest
}

// locate finds the place of a proved function and compares it with what is
// declared.
func (j *job) locate(image *match.Image, o *original, f queue.Replaced, p *match.Proved) error {
	addr, ok, err := image.Find(o.object, o.unit.Source, f.Name)
	if err != nil {
		return err
	}
	place, there := image.Place(f.Name, addr)
	if !ok || !there {
		return fault.New(fault.Internal, "match", "function %s was proved, but is nowhere", f.Name)
	}
	p.Position, p.SHA256 = place.Position, place.SHA256
	if uint(place.Position) != f.Position && (f.Position != 0 || place.Of != 1) {
		r := build.Refuse("no_such_function", o.unit.Source)
		r.Function = f.Name
		r.Detail = fmt.Sprintf("%s has %d symbols of this name; that of %s is at position %d, declared is %d",
			o.unit.Object, place.Of, o.unit.Source, place.Position, f.Position)
		j.refuse(r)
	}
	if !place.Traceable {
		r := build.Refuse("not_traceable", o.unit.Source)
		r.Function = f.Name
		j.refuse(r)
	}
	return nil
}

// compare wants of each new function the prototype of the one it replaces.
func (j *job) compare(context.Context) error {
	var names []string
	for _, e := range j.tables.Functions {
		names = append(names, e.New)
	}
	ours, err := readFunctions(j.file.info, names)
	if err != nil {
		return err
	}
	for _, o := range j.originals {
		names = nil
		for _, f := range o.functions {
			names = append(names, f.Name)
		}
		if o.info, err = functionsOf(o.object, names); err != nil {
			return err
		}
		for _, f := range o.functions {
			i := slices.IndexFunc(j.tables.Functions, func(e entry) bool { return e.Object == f.Object && e.Name == f.Name })
			was, is := o.info.prototypes[f.Name], ours.prototypes[j.tables.Functions[i].New]
			if len(was) == 1 && len(is) == 1 && was[0] == is[0] {
				continue
			}
			r := build.Refuse("prototype_changed", j.codeFiles())
			r.Function = f.Name
			r.Detail = fmt.Sprintf("the kernel's is %s; that of %s is %s", strings.Join(was, " or "), j.tables.Functions[i].New, strings.Join(is, " or "))
			j.refuse(r)
		}
	}
	return nil
}

// warn says what this driver cannot know.
func (j *job) warn(context.Context) error {
	say := func(r build.Refusal) { j.result.Warnings = append(j.result.Warnings, r) }
	for _, o := range j.originals {
		for _, f := range o.functions {
			r := build.Refuse("not_proved", o.unit.Source)
			r.Function = f.Name
			i := slices.IndexFunc(j.result.Match.Replaced, func(p match.Proved) bool { return p.Object == f.Object && p.Function == f.Name })
			p := j.result.Match.Replaced[i]
			r.Detail = fmt.Sprintf("proved: %s of %s is in %s at position %d, %d bytes, SHA-256 %s; not proved: what replaces it",
				f.Name, o.unit.Source, f.Object, p.Position, p.Bytes, p.SHA256)
			say(r)
			if o.info.inlined[f.Name] {
				r := build.Refuse("inlined", o.unit.Source)
				r.Function = f.Name
				say(r)
			}
		}
	}
	for _, c := range j.tables.Callbacks {
		r := build.Refuse("callbacks", j.codeFiles())
		r.Detail = c.Object + ": " + strings.Join(c.When, ", ")
		say(r)
	}
	return nil
}
