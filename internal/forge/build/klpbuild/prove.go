// SPDX-License-Identifier: Apache-2.0

package klpbuild

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/sandbox"
)

// vmlinux is the object name of the kernel itself.
const vmlinux = "vmlinux"

// image opens what runs: vmlinux, or a module whose file was named when the
// kernel was added. Nil means that it was not.
func (j *job) image(object string) (*match.Image, error) {
	if im, ok := j.images[object]; ok {
		return im, nil
	}
	var im *match.Image
	var err error
	if object == vmlinux {
		im, err = match.Open(j.tree.Vmlinux())
	} else if file := j.tree.ModuleFile(object); regular(file) {
		im, err = match.OpenModule(file, object)
	}
	if err != nil {
		return nil, err
	}
	j.images[object] = im
	return im, nil
}

// prove compares the functions to be replaced, and all others of the changed
// objects, with what runs, and looks whether every name that the module leaves
// to the kernel means the same there.
func (j *job) prove(ctx context.Context) error {
	done := j.clock.Step("match", "prove that the unpatched code is what the kernel runs")
	for _, o := range j.reached {
		var names []string
		for _, r := range j.patch.replaced {
			if r.Object == o.unit.Object && slices.Contains(o.functions, r.Name) {
				names = append(names, r.Name)
			}
		}
		if err := j.proveObject(ctx, o, names); err != nil {
			return err
		}
	}
	for _, r := range j.patch.replaced {
		if err := j.provePosition(r); err != nil {
			return err
		}
	}
	for _, s := range j.patch.needs {
		if err := j.proveSymbol(s); err != nil {
			return err
		}
	}
	m := &j.result.Match
	done(fmt.Sprintf("%d of %d functions identical", m.Identical, m.Checked))
	return nil
}

// proveObject compares one object. Functions that differ are compared again
// as the kernel was perhaps compiled: not in sections of their own.
func (j *job) proveObject(ctx context.Context, o object, names []string) error {
	image, err := j.image(o.unit.Object)
	if err != nil {
		return err
	}
	if image == nil {
		r := build.Refuse("match_failed", o.unit.Source)
		r.Hint = "name the files of the kernel's modules: klatch-forge kernel add --modules DIR"
		r.Detail = "the file of module " + o.unit.Object + " that runs is not known"
		j.refuse(r)
		return nil
	}
	traced, err := traceable(o.original)
	if err != nil {
		return err
	}
	for _, n := range names {
		if !traced[n] {
			r := build.Refuse("not_traceable", o.unit.Source)
			r.Function = n
			j.refuse(r)
		}
	}
	r := match.Empty()
	if err := image.Object(o.original, o.unit.Source, names, &r); err != nil {
		return err
	}
	if slices.ContainsFunc(r.Different, func(d match.Difference) bool { return d.Replaced }) {
		file, err := j.asShipped(ctx, o)
		if err != nil {
			return err
		}
		again := match.Empty()
		if err := image.Object(file, o.unit.Source, names, &again); err != nil {
			return err
		}
		r = r.Better(again)
	}
	j.result.Match.Add(r)
	for _, d := range r.Different {
		if d.Replaced {
			j.unproved(d.File, d.Function, d.Why)
		}
	}
	return nil
}

func (j *job) unproved(file, function, why string) {
	r := build.Refuse("match_failed", file)
	r.Function, r.Detail = function, why
	j.refuse(r)
}

// asShipped compiles an unpatched object without klp-build's flags, with the
// very command that klp-build's make used.
func (j *job) asShipped(ctx context.Context, o object) (string, error) {
	cmd, err := read(filepath.Join(j.tree.Source(), filepath.Dir(o.unit.Target), "."+filepath.Base(o.unit.Target)+".cmd"))
	if err != nil {
		return "", err
	}
	line, _, _ := bytes.Cut(cmd, []byte("\n"))
	_, command, ok := strings.Cut(string(line), " := ")
	if !ok {
		return "", fault.New(fault.Internal, "bad_recipe", "command of %s: %.100q", o.unit.Target, line)
	}
	for _, flag := range []string{" -ffunction-sections", " -fdata-sections"} {
		command = strings.ReplaceAll(command, flag, "")
	}
	scratch := filepath.Join(j.folder, "shipped")
	res, err := j.run(ctx, scratch, sandbox.Command{Stdin: strings.NewReader("pound := \\#\nall:\n\t@set -e; rm -f '" + o.unit.Target + "'; " + command + "\n"),
		Argv: []string{"make", "-r", "-s", "-f", "-"}})
	if err != nil {
		return "", err
	}
	if res.Exit != 0 {
		return "", fault.New(fault.Internal, "compile", "compile %s unpatched: %s", o.unit.Source, complaint(res.Output))
	}
	return upper(scratch, o.unit.Target), nil
}

// provePosition looks whether the kernel finds the function that was proved
// when it is asked for one of this name and position.
func (j *job) provePosition(r replaced) error {
	image, err := j.image(r.Object)
	if err != nil || image == nil {
		return err // refused already
	}
	proved := 0
	for _, p := range j.result.Match.Replaced {
		if p.Object == r.Object && p.Function == r.Name {
			proved++
		}
	}
	switch _, of := image.Position(r.Name, 0); {
	case proved == 0:
		if len(j.result.Refusals) == 0 {
			j.unproved(strings.Join(j.plan.Files(), ", "), r.Name, "the function was not compared")
		}
		return nil
	case of == 1 && r.pos <= 1:
		return nil
	case r.pos == 0:
		j.unproved(strings.Join(j.plan.Files(), ", "), r.Name, fmt.Sprintf("the kernel has %d of this name", of))
		return nil
	}
	return j.proveSymbol(symbol{r.Object, r.Name, r.pos})
}

// proveSymbol looks whether a name and position mean the same in the original
// build, where klp-build counted, and in what runs.
func (j *job) proveSymbol(s symbol) error {
	image, err := j.image(s.object)
	if err != nil || image == nil {
		return err
	}
	_, of := image.Position(s.name, 0)
	if s.pos == 0 {
		if of != 1 {
			j.unproved(strings.Join(j.plan.Files(), ", "), s.name, fmt.Sprintf("the fix refers to it, and the kernel has %d of this name", of))
		}
		return nil
	}
	ours, err := j.originalImage(s.object)
	if err != nil {
		return err
	}
	if why := image.Twins(ours, s.name); why != "" {
		j.unproved(strings.Join(j.plan.Files(), ", "), s.name, "there are several of this name, and their order is not sure: "+why)
	}
	return nil
}

// originalImage opens what klp-build counted positions in.
func (j *job) originalImage(object string) (*match.Image, error) {
	key := "original " + object
	if im, ok := j.images[key]; ok {
		return im, nil
	}
	var im *match.Image
	var err error
	if object == vmlinux {
		im, err = match.Open(filepath.Join(j.tree.Source(), "klp-tmp/1-orig/vmlinux"))
	} else {
		m, ok := j.units.Module(object)
		if !ok {
			return nil, fault.New(fault.Internal, "bad_module", "module of klp-build names module %s, which the kernel does not have", object)
		}
		im, err = match.OpenModule(filepath.Join(j.tree.Source(), m.Path), object)
	}
	j.images[key] = im
	return im, err
}

// traceable lists the functions of an object that ftrace can redirect: the
// compiler writes down their calls in section __mcount_loc
// (Documentation/trace/ftrace-design.rst).
func traceable(file string) (map[string]bool, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	out := map[string]bool{}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("symbols of %s: %w", file, err)
	}
	for _, s := range f.Sections {
		if s.Type != elf.SHT_RELA || !strings.HasPrefix(s.Name, ".rela__mcount_loc") && !strings.HasPrefix(s.Name, ".rela__patchable_function_entries") || s.Size > 16<<20 {
			continue
		}
		data, err := s.Data()
		if err != nil {
			return nil, fmt.Errorf("section %s of %s: %w", s.Name, file, err)
		}
		const entry = 24 // Elf64_Rela
		for ; len(data) >= entry; data = data[entry:] {
			sym := binary.LittleEndian.Uint64(data[8:]) >> 32
			if sym == 0 || sym > uint64(len(symbols)) {
				continue
			}
			to := symbols[sym-1]
			at := to.Value + binary.LittleEndian.Uint64(data[16:])
			for _, fn := range symbols {
				if elf.ST_TYPE(fn.Info) == elf.STT_FUNC && fn.Section == to.Section && at >= fn.Value && at < fn.Value+fn.Size {
					out[fn.Name] = true
				}
			}
		}
	}
	return out, nil
}
