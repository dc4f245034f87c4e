// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/module"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// debugFlags give debug information and leave the code as it is: gcc promises
// the same code with and without (-fcompare-debug), and the match proof is made
// on objects that were compiled so.
const debugFlags = "-g -gdwarf-4 -gno-record-gcc-switches"

// compile makes the module, with debug information, and its stripped twin.
func (j *job) compile(ctx context.Context) error {
	done := j.clock.Step("compile_module", "compile the hand-written module")
	name := j.plan.Sequence.ModuleName()
	parts := map[string][]byte{module.GlueName: module.Glue}
	var objects []string
	for _, f := range j.hand.Files {
		if base, ok := strings.CutSuffix(f.Name, ".c"); ok {
			objects = append(objects, base+".o")
		}
		if f.Name != queue.DeclaredName {
			parts[f.Name] = f.Content
		}
	}
	parts["Makefile"] = fmt.Appendf(nil, "# SPDX-License-Identifier: GPL-2.0-only\nobj-m += %[1]s.o\n%[1]s-objs := %[2]s %[3]s\nCFLAGS_%[3]s += %[4]s\n",
		name, strings.Join(objects, " "), module.GlueObject, module.GlueFlags(j.plan))
	packed, err := module.Pack(parts)
	if err != nil {
		return err
	}
	res, err := j.run(ctx, sandbox.Command{Argv: []string{"tar", "-x", "-f", "-", "--no-same-owner"}, Stdin: bytes.NewReader(packed)})
	if err != nil {
		return err
	}
	if res.Exit != 0 {
		return fault.New(fault.Internal, "compile", "unpack the module's source: %s", shorten(string(res.Output)))
	}
	// The tree's own place must not reach the module's build id.
	res, err = j.make(ctx, debugFlags+" -ffile-prefix-map="+j.tree.Source()+"=.", "M="+module.Folder, "modules")
	if err != nil {
		return err
	}
	if res.Exit != 0 {
		return j.notCompiled(res)
	}
	built := filepath.Join(module.Folder, name+".ko")
	res, err = j.run(ctx, sandbox.Command{Argv: []string{"strip", "--strip-debug", "-o", built + ".stripped", built}})
	if err != nil {
		return err
	}
	if res.Exit != 0 {
		return fault.New(fault.Internal, "compile", "strip %s: %s", name, shorten(string(res.Output)))
	}
	full, err := durable.ReadFile(j.upper(built), livepatch.MaxModule)
	if err != nil {
		return err
	}
	if j.ko, err = durable.ReadFile(j.upper(built+".stripped"), livepatch.MaxModule); err != nil {
		return err
	}
	if j.file, err = openModule(full); err != nil {
		return err
	}
	done(fmt.Sprintf("%s.ko, %d KiB", name, len(j.ko)/1024))
	return nil
}

// undefinedSymbol is what modpost says of a symbol that neither the kernel nor
// a module exports (scripts/mod/modpost.c, check_exports).
var undefinedSymbol = regexp.MustCompile(`modpost: "([A-Za-z0-9_.]+)" \[[^\]]*\] undefined!`)

// notCompiled tells source that the compiler or modpost refuses from a build
// that went wrong by itself.
func (j *job) notCompiled(res sandbox.Result) error {
	log := string(res.Output)
	for _, m := range undefinedSymbol.FindAllStringSubmatch(log, -1) {
		r := build.Refuse("symbol_missing", j.codeFiles())
		r.Function = m[1]
		r.Detail = "a hand-written module can use what the kernel exports to modules, and nothing else"
		j.refuse(r)
	}
	if len(j.result.Refusals) > 0 {
		return nil
	}
	said := complaints(log)
	if len(said) == 0 {
		return fault.New(fault.Internal, "compile", "compile the hand-written module: %s", shorten(log))
	}
	r := build.Refuse("does_not_compile", j.codeFiles())
	r.Detail = shorten(strings.Join(said, "\n"))
	j.refuse(r)
	return nil
}

func complaints(log string) []string {
	const most = 50 // lines
	var out []string
	for line := range strings.Lines(log) {
		if (strings.Contains(line, "error:") || strings.Contains(line, "ERROR: modpost:")) && len(out) < most {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// read takes from the module what the kernel will be told, and compares it with
// what is declared.
func (j *job) read(context.Context) error {
	refusals, err := module.Inspect(j.ko, j.plan)
	if err != nil {
		if info, ierr := module.Info(j.ko); ierr == nil && len(info["livepatch"]) == 0 {
			r := build.Refuse("module_shape", j.codeFiles())
			r.Detail = `the module lacks MODULE_INFO(livepatch, "Y")`
			j.refuse(r)
			return nil
		}
		return err
	}
	j.result.Refusals = append(j.result.Refusals, refusals...)
	if j.tables, err = j.file.readTables(); err != nil {
		return j.refuseShape(err)
	}
	if !j.tables.Replace {
		j.refuse(build.Refuse("no_replace", j.codeFiles()))
	}
	if err := j.file.checkShape(j.tables); err != nil {
		if err := j.refuseShape(err); err != nil {
			return err
		}
	}
	for _, why := range undeclared(j.hand, j.tables, j.file.undefined()) {
		r := build.Refuse("not_declared", declaredFile())
		r.Function, r.Detail = why.function, why.text
		j.refuse(r)
	}
	return nil
}

// mismatch is one thing in which module and declaration differ.
type mismatch struct{ function, text string }

func undeclared(h *queue.Handwritten, t tables, undefined []string) []mismatch {
	var out []mismatch
	differ := func(function, format string, args ...any) {
		out = append(out, mismatch{function, fmt.Sprintf(format, args...)})
	}
	seen := map[string]bool{}
	for _, e := range t.Functions {
		key := e.Object + ":" + e.Name
		if seen[key] {
			differ(e.Name, "the module replaces %s twice", key)
		}
		seen[key] = true
		i := slices.IndexFunc(h.Functions, func(f queue.Replaced) bool { return f.Object == e.Object && f.Name == e.Name })
		switch {
		case i < 0:
			differ(e.Name, "the module replaces %s, which is not declared", key)
		case uint64(h.Functions[i].Position) != e.Position:
			differ(e.Name, "the module replaces %s at position %d, declared is %d", key, e.Position, h.Functions[i].Position)
		}
	}
	for _, f := range h.Functions {
		if key := f.Object + ":" + f.Name; !seen[key] {
			differ(f.Name, "declared is %s, which the module does not replace", key)
		}
	}
	has, says := callbackWords(t.Callbacks), callbackWords(h.Callbacks)
	for _, w := range has {
		if !slices.Contains(says, w) {
			differ("", "the module has a callback %s, which is not declared", w)
		}
	}
	for _, w := range says {
		if !slices.Contains(has, w) {
			differ("", "declared is a callback %s, which the module does not have", w)
		}
	}
	uses := slices.ContainsFunc(undefined, func(s string) bool { return strings.HasPrefix(s, "klp_shadow_") })
	if uses != (len(h.Shadows) > 0) {
		differ("", "declared are %d shadow variables; the module uses some: %v", len(h.Shadows), uses)
	}
	return out
}

func callbackWords(all []queue.Callback) []string {
	var out []string
	for _, c := range all {
		for _, w := range c.When {
			out = append(out, c.Object+" "+w)
		}
	}
	slices.Sort(out)
	return out
}
