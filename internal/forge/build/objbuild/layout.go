// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/layout"
	"klatch/internal/forge/headers"
)

const (
	maxLayouts = 10 // refusals for types: one that grows makes others grow
	maxMembers = 8  // told of one type
)

// layouts refuses a changed layout of a data type: the kernel holds objects of
// the old one, and the functions that are not replaced go on making them.
//
// Which objects must be looked at? Only functions of objects whose code
// changed get into the livepatch. A type that is the same in all of those is
// the same for all new code, whatever others make of it, so the others are
// never compiled here. That also covers what reach left out: an object that
// uses none of the new members keeps its old functions, and one that is in the
// livepatch shows here that the type changed.
//
// Of those whose code changed, one is enough for a changed definition that
// reads the same in every unit (headers.Definition, Fixed); the types that are
// made with a changed macro, enumerator or typedef are found by their text.
// Where no name tells which types change (an #include, a condition, a macro
// that makes types) or where units may read a header differently, every
// changed object that reads it is looked at.
//
// Most patches change function bodies only; they pay for reading their text.
func (j *job) layouts(ctx context.Context) error {
	done := j.clock.Step("layout", "look whether a data type changes its layout")
	var changed []*object
	for _, o := range j.objects {
		if !o.same {
			changed = append(changed, o)
		}
	}
	slices.SortStableFunc(changed, byCost)
	need, err := j.lookAt(changed)
	if err != nil {
		return err
	}
	looked, told := 0, map[string]bool{}
	for _, part := range need.inOrder() {
		looked += len(part)
		if err := j.compareTypes(ctx, part, need.files, told); err != nil {
			return err
		}
		if len(j.result.Refusals) > 0 {
			break
		}
	}
	if looked == 0 {
		done("only functions change")
	} else {
		done(fmt.Sprintf("%d object(s)", looked))
	}
	return nil
}

// byCost orders objects: those that are touched directly, then the small ones.
func byCost(a, b *object) int {
	switch {
	case a.direct == b.direct:
		return len(a.deps) - len(b.deps)
	case a.direct:
		return -1
	}
	return 1
}

// needed is the list of objects to look at.
type needed struct {
	first, rest []*object         // those that most likely show a change, and the others
	files       map[string]string // of a type's tag, where it is defined
}

func (n needed) inOrder() [][]*object { return [][]*object{n.first, n.rest} }

func (n *needed) add(os []*object, first bool) {
	for _, o := range os {
		switch {
		case slices.Contains(n.first, o):
		case first:
			n.first = append(n.first, o)
			n.rest = slices.DeleteFunc(n.rest, func(r *object) bool { return r == o })
		case !slices.Contains(n.rest, o):
			n.rest = append(n.rest, o)
		}
	}
}

// lookAt chooses among the changed objects.
func (j *job) lookAt(changed []*object) (needed, error) {
	n := needed{files: map[string]string{}}
	for _, f := range j.plan.Files() {
		was, is, err := j.bothTexts(f)
		if err != nil {
			return n, err
		}
		o := headers.Compare(f, was, is)
		readers := j.readers(changed, f)
		if o.Empty() || len(readers) == 0 {
			continue
		}
		bound, whole, err := j.bound(o.Names, f, readers)
		if err != nil {
			return n, err
		}
		o.Whole = o.Whole || whole
		if o.Whole || slices.ContainsFunc(readers, j.more) { // nobody knows yet which of them read the file
			n.add(readers, false)
		}
		if o.Whole || len(o.Types) > 0 {
			n.add(readers[:1], true)
		}
		for _, d := range slices.Concat(o.Types, bound) {
			for _, t := range d.Names {
				n.files[t] = d.File
			}
			seen := j.readers(readers, d.File)
			n.add(seen[:min(1, len(seen))], true)
			if !d.Fixed {
				n.add(seen, false)
			}
		}
	}
	return n, nil
}

// bothTexts gives a file as it was and as it is: what no patch touches stays.
func (j *job) bothTexts(f string) (was, is string, err error) {
	b, err := durable.ReadFile(filepath.Join(j.tree.Source(), f), maxSource)
	if err != nil {
		return "", "", err
	}
	a, err := durable.ReadFile(j.upper(f), maxSource)
	if errors.Is(err, fs.ErrNotExist) {
		return string(b), string(b), nil
	}
	return string(b), string(a), err
}

// readers are the objects that a file is compiled into. Where a patch adds an
// #include, nobody has listed what the patched source reads.
func (j *job) readers(objects []*object, f string) []*object {
	var out []*object
	for _, o := range objects {
		if j.more(o) || o.unit.Source == f || slices.Contains(o.deps, f) {
			out = append(out, o)
		}
	}
	return out
}

// bound finds the types, in what the readers of a file are compiled from,
// whose text uses one of the names.
func (j *job) bound(names []string, f string, readers []*object) ([]headers.Definition, bool, error) {
	if len(names) == 0 {
		return nil, false, nil
	}
	files := []string{f}
	for _, o := range readers {
		files = append(append(files, o.unit.Source), o.deps...)
	}
	slices.Sort(files)
	return headers.Bound(names, slices.Compact(files), func(f string) ([]byte, error) {
		for _, name := range []string{j.upper(f), filepath.Join(j.tree.Source(), f)} { // patched, or made by the build; else as it is
			b, err := durable.ReadFile(name, maxSource)
			if !errors.Is(err, fs.ErrNotExist) {
				return b, err
			}
		}
		return nil, nil // made by a build whose objects were reused
	})
}

// compareTypes compares the types of objects, and refuses, each type once.
func (j *job) compareTypes(ctx context.Context, objects []*object, files map[string]string, told map[string]bool) error {
	all, err := j.changesOf(ctx, objects)
	if err != nil {
		return err
	}
	for i, o := range objects {
		for _, cs := range byType(all[i]) {
			t := cs[0].Type
			_, tag, _ := strings.Cut(t, " ")
			file := files[tag]
			if file == "" {
				file = o.unit.Source
			}
			code := fault.Code("layout_changed")
			if !slices.ContainsFunc(cs, func(c layout.Change) bool { return !c.Kind.Harmless() }) {
				code = "layout_meaning"
			}
			id := string(code) + " " + file + " " + t
			if told[id] {
				continue
			}
			told[id] = true
			r := build.Refuse(code, file)
			r.Type, r.Detail = t, detail(cs)
			switch {
			case code == "layout_meaning":
				j.warn(r)
			case file == o.unit.Source && strings.HasPrefix(t, "struct "):
				if err := j.confine(o, tag, r); err != nil {
					return err
				}
			case len(j.result.Refusals) < maxLayouts:
				j.refuse(r)
			}
		}
	}
	return nil
}

func byType(cs []layout.Change) [][]layout.Change {
	var out [][]layout.Change
	for _, c := range cs {
		if n := len(out); n > 0 && out[n-1][0].Type == c.Type {
			out[n-1] = append(out[n-1], c)
		} else {
			out = append(out, []layout.Change{c})
		}
	}
	return out
}

func detail(cs []layout.Change) string {
	var parts []string
	for i, c := range cs {
		if i == maxMembers {
			parts = append(parts, fmt.Sprintf("and %d more", len(cs)-i))
			break
		}
		parts = append(parts, c.String())
	}
	return strings.Join(parts, "; ")
}
