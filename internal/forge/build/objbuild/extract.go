// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/delta"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Exit statuses of create-diff-object (create-diff-object.c).
const (
	differOK           = 0
	noFunctionalChange = 3
)

// extract runs create-diff-object on every changed object and reads from its
// output which functions the livepatch replaces.
func (j *job) extract(ctx context.Context) error {
	done := j.clock.Step("diff", "extract the changed functions")
	if err := errors.Join(j.writableDir("diff"), j.detach()); err != nil {
		return err
	}
	var todo []*object
	for _, o := range j.objects {
		o.compared = o.original
		if !o.same {
			todo = append(todo, o)
		}
	}
	if err := j.hideExports(ctx, todo); err != nil {
		return err
	}
	if err := j.differ(ctx, todo); err != nil {
		return err
	}
	if err := j.takeAlong(ctx, todo); err != nil {
		return err
	}
	for _, o := range j.objects {
		if err := j.differSaid(o); err != nil {
			return err
		}
	}
	if len(j.result.Refusals) > 0 {
		return nil
	}
	for _, o := range j.objects {
		if o.same {
			j.result.Unchanged = append(j.result.Unchanged, o.unit.Source)
		}
	}
	if err := j.somethingChanged(); err != nil {
		return err
	}
	if err := j.onlyReplaced(ctx); err != nil || len(j.result.Refusals) > 0 {
		return err
	}
	if err := j.place(); err != nil {
		return err
	}
	if j.result.Functions = j.functions(); len(j.result.Functions) == 0 {
		j.nothingReplaced()
	}
	done(fmt.Sprintf("%d function(s)", len(j.result.Functions)))
	return nil
}

// differ runs create-diff-object on objects side by side.
func (j *job) differ(ctx context.Context, objects []*object) error {
	var ts []task
	for _, o := range objects {
		out := j.diffFile(o)
		symbols := j.tree.Symbols()
		if o.unit.Object != vmlinux {
			symbols = j.tree.ModuleSymbols(o.unit.Object)
		}
		args := []string{j.Tools.program("create-diff-object"), o.compared, o.patched, o.unit.Object, symbols,
			filepath.Join(j.tree.Source(), "Module.symvers"), j.plan.Sequence.ModuleName(), out}
		// The differ names functions by the object that it is given, by its
		// last path element only; errors follow in its output.
		ts = append(ts, task{out: out, command: fmt.Sprintf("'%s' > '%s.log' 2>&1 || rc=$$?; echo $${rc:-0} > '%s.rc'", strings.Join(args, "' '"), out, out)})
	}
	if len(ts) == 0 {
		return nil
	}
	res, err := j.runTasks(ctx, ts, []string{j.file("diff")})
	if err == nil && res.Exit != 0 {
		err = fault.New(fault.Internal, "differ", "run create-diff-object: %s", shorten(res.Output))
	}
	return err
}

// takeAlong repeats the differ where a replaced function would jump into its
// old cold part.
func (j *job) takeAlong(ctx context.Context, objects []*object) error {
	var again []*object
	for _, o := range objects {
		diff, err := durable.ReadFile(j.diffFile(o), livepatch.MaxModule)
		if err != nil {
			continue // it refused; differSaid says why
		}
		parts, err := leftBehind(diff)
		if err != nil {
			return err
		}
		if len(parts) == 0 {
			continue
		}
		original, err := durable.ReadFile(o.compared, livepatch.MaxModule)
		if err != nil {
			return err
		}
		changed, left, err := differing(original, parts)
		if err != nil {
			return err
		}
		for _, p := range left {
			r := j.refusal("unreconcilable", o)
			r.Function, r.Detail = p, "it jumps back into the old function by a jump label, and the differ leaves it behind"
			j.refuse(r)
		}
		if bytes.Equal(changed, original) {
			continue
		}
		o.compared = j.file("compare", o.flat())
		if err := j.write(o.compared, changed); err != nil {
			return err
		}
		again = append(again, o)
	}
	return j.differ(ctx, again)
}

// differSaid reads how the differ ended for one object. Its files are of the
// build user: perhaps links, or without end.
func (j *job) differSaid(o *object) error {
	if o.same {
		return nil
	}
	out := j.diffFile(o)
	rc, err := durable.ReadFile(out+".rc", 16)
	if err != nil {
		return fault.New(fault.Internal, "differ", "create-diff-object of %s did not end: %w", o.unit.Target, err)
	}
	said, err := durable.ReadFile(out+".log", 8<<20)
	if err != nil {
		return err
	}
	status, err := strconv.Atoi(strings.TrimSpace(string(rc)))
	if err != nil {
		return fault.New(fault.Internal, "differ", "create-diff-object of %s ended with %q", o.unit.Target, rc)
	}
	switch {
	case status == noFunctionalChange:
		o.same = true
		return nil
	case status > 128: // killed by a signal (POSIX shell, 2.8.2)
		return fault.New(fault.Internal, "differ", "create-diff-object of %s was killed: status %d: %s", o.unit.Target, status, shorten(said))
	case status != differOK:
		if why := troubleIn(said); why != "" {
			return fault.New(fault.Unavailable, "differ", "create-diff-object of %s: %s", o.unit.Target, why)
		}
		j.refuseDiffer(o, said)
		return nil
	}
	diff, err := durable.ReadFile(out, livepatch.MaxModule)
	if err != nil {
		return err
	}
	list, err := replacedFunctions(diff)
	if err != nil {
		return err
	}
	for _, r := range list {
		o.changed = append(o.changed, r.Function)
	}
	original, err := durable.ReadFile(o.original, livepatch.MaxModule)
	if err != nil {
		return err
	}
	patched, err := durable.ReadFile(o.patched, livepatch.MaxModule)
	if err != nil {
		return err
	}
	copies, err := delta.Copies(original, patched, diff)
	if err != nil {
		return err
	}
	for _, c := range copies {
		r := j.refusal(fault.Code(c.Kind), o)
		r.Function, r.Section, r.Detail = c.Name, c.Section, c.Why
		j.refuse(r)
	}
	return nil
}

// somethingChanged refuses a source patch that changes no object code at all:
// it fixes nothing, whatever its header says.
func (j *job) somethingChanged() error {
	for _, p := range j.plan.Patches {
		built := false
		changes := slices.ContainsFunc(j.objects, func(o *object) bool {
			of := slices.ContainsFunc(p.Files, func(f string) bool { return f == o.unit.Source || slices.Contains(o.deps, f) })
			built = built || of
			return of && !o.same
		})
		if changes {
			continue
		}
		if !built {
			reaches := slices.ContainsFunc(p.Files, func(f string) bool { return !slices.Contains(j.result.NotBuilt, f) })
			if !reaches {
				continue // this kernel needs nothing of it
			}
		}
		j.refuse(build.Refuse("nothing_changed", strings.Join(p.Files, ", ")))
	}
	return nil
}

// nothingReplaced refuses a livepatch of new code only: nobody would call it.
// One object of several may be like that.
func (j *job) nothingReplaced() {
	for _, o := range j.objects {
		if !o.same {
			j.refuse(j.refusal("nothing_replaced", o))
		}
	}
}

// diffFile has a flat name, so that one writable folder is enough.
func (j *job) diffFile(o *object) string { return j.file("diff", o.flat()) }

func (j *job) writableDir(rel string) error {
	if err := os.MkdirAll(j.file(rel), 0o755); err != nil {
		return err
	}
	return sandbox.Own(j.file(rel))
}

// env is the environment of the differ: sizes that it cannot find out.
func (j *job) env() []string {
	env := sandbox.BaseEnv()
	for name, size := range j.plan.Kernel.StructSizes {
		env = append(env, name+"="+strconv.Itoa(size))
	}
	slices.Sort(env)
	return env
}

// complaints maps what create-diff-object says to refusals. Its texts are
// those of version 0.9.10 and 0.9.11.
var complaints = []struct {
	text *regexp.Regexp // the first group, if any, is the function
	code fault.Code
}{
	{regexp.MustCompile(`changed section \S*(?:\.data|\.bss)\S* not selected for inclusion|data section (\S+) (?:changed|selected)`), "data_changed"},
	{regexp.MustCompile(`(?:section|changed section) \S*(?:\.init|\.exit)\S*`), "init_code"},
	{regexp.MustCompile(`function (\S+) has no fentry/mcount call`), "not_traceable"},
	{regexp.MustCompile(`static local (?:variable )?(\S+) (?:in \S+ was removed|has been correlated)|unreconcilable difference`), "unreconcilable"},
	{regexp.MustCompile(`Found a jump label at (\S+?)(?:\(\))?[+,]\S*.*key`), "static_key"},
	{regexp.MustCompile(`Found a static call at (\S+?)(?:\(\))?[+,]`), "static_call"},
	{regexp.MustCompile(`(?:can't find|lookup_symbol|undefined reference|not found).*symbol.* (\S+)|symbol (\S+).*not found`), "symbol_missing"},
}

func (j *job) refuseDiffer(o *object, said []byte) {
	r := j.refusal("differ_refused", o)
	for _, c := range complaints {
		if m := c.text.FindSubmatch(said); m != nil {
			r = j.refusal(c.code, o)
			for _, g := range m[1:] {
				if len(g) > 0 {
					r.Function = string(g)
				}
			}
			break
		}
	}
	r.Detail = shorten(said)
	j.refuse(r)
}
