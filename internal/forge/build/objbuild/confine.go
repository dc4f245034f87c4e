// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/headers"
	"klatch/internal/livepatch"
)

// local is a type whose layout changed and whose objects live only within
// calls, if its functions are all replaced.
type local struct {
	object  *object
	refusal build.Refusal // if they are not
	texts   []headers.Confined
}

// confine lets a changed layout through for now if the text of the unit shows
// that no object of the type leaves the calls that make it. Whether these are
// all replaced is seen after the differ ran: local.
func (j *job) confine(o *object, tag string, r build.Refusal) error {
	why, texts := "", []headers.Confined{}
	was, is, err := j.bothTexts(o.unit.Source)
	if err != nil {
		return err
	}
	for _, text := range []string{was, is} {
		c, no := headers.Confine(text, tag)
		if no != "" && why == "" {
			why = no
		}
		texts = append(texts, c)
	}
	for _, f := range o.deps {
		if why != "" || f == o.unit.Source {
			continue
		}
		b, err := durable.ReadFile(filepath.Join(j.tree.Source(), f), maxSource)
		if err != nil {
			why = "one of its headers cannot be read" // made by the build
		} else if bytes.Contains(b, []byte(tag)) {
			why = f + " mentions it"
		}
	}
	if j.more(o) {
		why = "the patch adds an #include"
	}
	if why != "" {
		r.Detail += "; its objects may outlive a call: " + why
		if len(j.result.Refusals) < maxLayouts {
			j.refuse(r)
		}
		return nil
	}
	j.locals = append(j.locals, local{o, r, texts})
	return nil
}

// confined refuses changed types whose objects live in a call of a function
// that is not replaced. The kernel's consistency model switches a task when
// none of the replaced functions is on its stack, so an object in the frame of
// one of them is only ever seen by old code or only by new. Inlining puts a
// variable into the frame of a caller, so all callers must be replaced too, up
// to those that nobody in the file calls. A part that the compiler split off
// (.cold) is not found on the stack under the function's name.
func (j *job) confined(_ context.Context) error {
	for _, l := range j.locals {
		was, err := functionSymbols(l.object.original)
		if err != nil {
			return err
		}
		is, err := functionSymbols(l.object.patched)
		if err != nil {
			return err
		}
		why := ""
		replaced := map[string]bool{}
		for _, f := range l.object.changed {
			replaced[f.Name] = true
		}
		for _, text := range l.texts {
			h := holder{users: text.Users, was: was, is: is, replaced: replaced, seen: map[string]bool{}}
			for _, f := range text.Births {
				if !l.texts[0].Defined[f] {
					why = fmt.Sprintf("%s is new", f)
				} else if no := h.holds(f); no != "" {
					why = no
				}
			}
		}
		r := l.refusal
		if why != "" {
			r.Detail += "; its objects live in calls that may not be replaced as a whole: " + why
			j.refuse(r)
			continue
		}
		w := build.Refuse("layout_local", r.File)
		births := slices.Concat(l.texts[0].Births, l.texts[1].Births)
		slices.Sort(births)
		w.Type, w.Detail = r.Type, r.Detail+"; it lives in "+strings.Join(slices.Compact(births), ", ")
		j.warn(w)
	}
	return nil
}

type holder struct {
	users    map[string][]string
	was, is  map[string][]string
	replaced map[string]bool
	seen     map[string]bool
}

// holds says why a function, or one that it may be inlined into, is not
// replaced.
func (h holder) holds(f string) string {
	if h.seen[f] {
		return ""
	}
	h.seen[f] = true
	if f == headers.UnknownUser {
		return "a macro makes a function that calls it"
	}
	if len(h.was[f])+len(h.users[f]) == 0 {
		return f + " is not in the unpatched object"
	}
	for _, s := range h.was[f] {
		if !h.replaced[s] {
			return s + " is not replaced"
		}
	}
	for _, s := range h.is[f] {
		if !slices.Contains(h.was[f], s) {
			return s + " is new"
		}
	}
	for _, u := range h.users[f] {
		if why := h.holds(u); why != "" {
			return why
		}
	}
	return ""
}

// functionSymbols lists the functions of an object by the name that the source
// has for them: f.isra.0 and f.cold are f's.
func functionSymbols(file string) (map[string][]string, error) {
	b, err := durable.ReadFile(file, livepatch.MaxModule)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read %s: %w", file, err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read symbols of %s: %w", file, err)
	}
	out := map[string][]string{}
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) != elf.STT_FUNC {
			continue
		}
		name, _, _ := strings.Cut(s.Name, ".")
		out[name] = append(out[name], s.Name)
	}
	for _, n := range slices.Collect(maps.Keys(out)) {
		slices.Sort(out[n])
	}
	return out, nil
}
