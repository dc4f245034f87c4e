// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build/delta"
	"klatch/internal/livepatch"
)

// Exported prototypes are compared in the form that the kernel makes symbol
// versions of: the output of genksyms, with -T, for the text that the compiler
// sees (scripts/Makefile.build, gensymtypes). The version itself also covers
// the members of every type that is reached; whether those keep their layout
// is another question, which the debug information answers exactly.

// dumpOriginal keeps the types of what the touched files export, unpatched. It
// runs before the patches are applied.
func (j *job) dumpOriginal(ctx context.Context) error {
	var objects []*object
	for _, o := range j.objects {
		b, err := durable.ReadFile(o.original, livepatch.MaxModule)
		if err != nil {
			return err
		}
		if o.direct && bytes.Contains(b, []byte("\x00__ksymtab_")) {
			o.exports = true
			objects = append(objects, o)
		}
	}
	return j.dump(ctx, objects, func(o *object) string { return o.original + ".symtypes" })
}

// compareExports refuses a changed prototype of an exported function.
func (j *job) compareExports(ctx context.Context) error {
	var objects []*object
	for _, o := range j.objects {
		if o.exports {
			objects = append(objects, o)
		}
	}
	if len(objects) == 0 {
		return nil
	}
	done := j.clock.Step("exports", fmt.Sprintf("compare what %d file(s) export", len(objects)))
	file := func(o *object) string { return o.patched + ".symtypes" }
	if err := j.dump(ctx, objects, file); err != nil {
		return err
	}
	for _, o := range objects {
		before, err := readTypes(o.original + ".symtypes")
		if err != nil {
			return err
		}
		after, err := readTypes(file(o))
		if err != nil {
			return err
		}
		for _, n := range sortedKeys(before, after) {
			was, is := before.prototype(n), after.prototype(n)
			if was == "" || is == "" || was == is || !j.symbols.Exports(o.unit.Object, n) {
				continue
			}
			r := j.refusal("export_changed", o)
			r.Function, r.Detail = n, fmt.Sprintf("before: %s; after: %s", was, is)
			j.refuse(r)
		}
	}
	done("")
	return nil
}

// hideExports takes the kernel's export tables out of what the differ compares
// where a fix exports something new: the differ refuses any change of their
// strings. What a fix stops exporting was refused before. Nothing outside this
// livepatch can ask for a new export, and its own objects are linked together.
func (j *job) hideExports(ctx context.Context, objects []*object) error {
	var ts []task
	var hidden []*object
	for _, o := range objects {
		is, err := newExports(o.compared, o.patched)
		if err != nil {
			return err
		}
		if !is {
			continue
		}
		for _, f := range []*string{&o.compared, &o.patched} {
			from := *f
			*f = j.file("diff", o.flat()+map[bool]string{true: ".compared", false: ".patched"}[f == &o.compared])
			ts = append(ts, task{out: *f, command: fmt.Sprintf("objcopy --wildcard --remove-section '*__ksymtab*' --remove-section '*__kcrctab*' --strip-symbol '__ksymtab_*' --strip-symbol '__kstrtab_*' "+
				"--strip-symbol '__kstrtabns_*' --strip-symbol '__crc_*' '%s' '%s'", from, *f)})
		}
		hidden = append(hidden, o)
	}
	if len(ts) == 0 {
		return nil
	}
	res, err := j.runTasks(ctx, ts, []string{j.file("diff")})
	if err != nil {
		return err
	}
	for _, o := range hidden {
		if !exists(o.compared) || !exists(o.patched) {
			return fault.New(fault.Internal, "objcopy", "take export tables out of %s: %s", o.unit.Target, shorten(res.Output))
		}
	}
	return nil
}

// newExports says whether an object exports what another does not.
func newExports(original, patched string) (bool, error) {
	var names [2]map[string]bool
	for i, file := range []string{original, patched} {
		b, err := durable.ReadFile(file, livepatch.MaxModule)
		if err != nil {
			return false, err
		}
		if names[i], err = delta.Exports(b); err != nil {
			return false, err
		}
	}
	for n := range names[1] {
		if !names[0][n] {
			return true, nil
		}
	}
	return false, nil
}

const maxTypes = 64 << 20 // of one object, in bytes

var (
	makesObject = regexp.MustCompile(` -c -o \S+\.o (\S+\.c)\s*$`)
	writesDeps  = regexp.MustCompile(` ?-Wp,-MMD,\S+`)
)

// dump writes the types of exported symbols into files, those that are missing.
func (j *job) dump(ctx context.Context, objects []*object, file func(*object) string) error {
	var ts []task
	var missing []*object
	for _, o := range objects {
		if exists(file(o)) {
			continue
		}
		compile, _, _ := strings.Cut(o.cmd, " ; ")
		m := makesObject.FindStringSubmatch(compile)
		if m == nil {
			o.exports = false // not compiled by the common rule: nothing to compare
			continue
		}
		compile = writesDeps.ReplaceAllString(strings.TrimSuffix(compile, m[0]), "")
		ts = append(ts, task{out: typesOf(o), command: fmt.Sprintf("%s -E -D__GENKSYMS__ -o '%s.i' '%s'; scripts/genksyms/genksyms -T '%s' -r /dev/null < '%s.i' > /dev/null",
			compile, typesOf(o), m[1], typesOf(o), typesOf(o))})
		missing = append(missing, o)
	}
	if len(ts) == 0 {
		return nil
	}
	res, err := j.runTasks(ctx, ts, nil)
	if err != nil {
		return err
	}
	for _, o := range missing {
		b, err := durable.ReadFile(j.upper(typesOf(o)), maxTypes)
		if err != nil {
			return fmt.Errorf("types that %s exports: %s: %w", o.unit.Source, shorten(res.Output), err)
		}
		if err := os.MkdirAll(filepath.Dir(file(o)), 0o755); err != nil {
			return err
		}
		if err := durable.WriteFile(file(o), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func typesOf(o *object) string { return o.unit.Target + ".symtypes" }

// types is a dump of genksyms: a type by "s#name" and such, an exported symbol
// by its name, each with its words.
type types map[string]string

func readTypes(file string) (types, error) {
	b, err := durable.ReadFile(file, maxTypes)
	if err != nil {
		return nil, err
	}
	t := types{}
	for line := range strings.Lines(string(b)) {
		if name, words, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			t[name] = words
		}
	}
	return t, nil
}

// prototype is what a symbol is declared as, its typedefs resolved. Qualifiers
// are left out: they change nothing for a caller.
func (t types) prototype(symbol string) string {
	if strings.Contains(symbol, "#") {
		return "" // a type
	}
	return strings.Join(t.resolve(strings.Fields(t[symbol]), 0), " ")
}

const maxTypedefs = 20 // that stand for one another

func (t types) resolve(words []string, depth int) []string {
	var out []string
	for _, w := range words {
		if slices.Contains([]string{"const", "volatile", "__const", "extern"}, w) {
			continue
		}
		if def, ok := t[w]; ok && strings.HasPrefix(w, "t#") && depth < maxTypedefs {
			out = append(out, t.resolve(strings.Fields(def), depth+1)...)
			continue
		}
		out = append(out, w)
	}
	return out
}
