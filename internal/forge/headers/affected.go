// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
)

// Change is what a patch does to one file that others include. Lines are
// those of the old text, from 1.
type Change struct {
	File     string
	Removed  []int
	Inserted []Insertion
}

// Insertion is new text that stands before a line of the old.
type Insertion struct {
	Before int
	Lines  []string
}

// Affected lists the units whose object code the changes can reach, sorted,
// and says how it narrowed them. A unit is left out only where none of the
// names that the changed text defines, nor of the names defined with the help
// of these, occurs in it or in a source file that it includes. Changes that
// have no name (conditions, members of a type) reach every includer.
func (g *Graph) Affected(changes []Change) (units []string, why string, err error) {
	reach := map[string]bool{}
	names := map[string]bool{}
	narrowed, all := 0, 0
	var includers []string
	for _, c := range changes {
		in := g.Includers(c.File)
		all += len(in)
		defined, whole, err := g.defined(c)
		if err != nil {
			return nil, "", err
		}
		if whole {
			for _, u := range in {
				reach[u] = true
			}
			continue
		}
		for n := range defined {
			names[n] = true
		}
		includers = append(includers, in...)
		narrowed++
	}
	if narrowed > 0 {
		if err := g.named(includers, names, reach); err != nil {
			return nil, "", err
		}
	}
	return sorted(reach), fmt.Sprintf("%d of %d includers", len(reach), all), nil
}

func (g *Graph) itemsOf(f string) ([]item, error) {
	if its, ok := g.items[f]; ok {
		return its, nil
	}
	b, err := durable.ReadFile(filepath.Join(g.tree, f), maxSource)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // one that the build makes is not there yet
		return nil, err
	}
	its := parse(string(b))
	g.items[f] = its
	return its, nil
}

// defined lists the names that the changed text defines; whole says that
// they cannot be known.
func (g *Graph) defined(c Change) (names map[string]bool, whole bool, err error) {
	its, err := g.itemsOf(c.File)
	if err != nil {
		return nil, false, err
	}
	names = map[string]bool{}
	add := func(it item) {
		switch it.kind {
		case layout, condition, generates:
			whole = true
		case blank:
		default:
			for _, n := range it.names {
				names[n] = true
			}
		}
	}
	for _, it := range its {
		if slices.ContainsFunc(c.Removed, func(l int) bool { return l >= it.first && l <= it.last }) ||
			slices.ContainsFunc(c.Inserted, func(n Insertion) bool { return n.Before > it.first && n.Before <= it.last }) {
			add(it)
		}
	}
	// What stands between two old items is items of its own.
	for _, n := range c.Inserted {
		if slices.ContainsFunc(its, func(it item) bool { return n.Before > it.first && n.Before <= it.last }) {
			continue
		}
		for _, it := range parse(strings.Join(n.Lines, "\n")) {
			if it.kind == layout { // a new type, or the old one, whose lines were removed
				it.kind = other
			}
			add(it)
		}
	}
	return names, whole, nil
}

// named adds the includers that use one of the names, after these were
// completed with every name whose definition uses one.
func (g *Graph) named(includers []string, names, reach map[string]bool) error {
	slices.Sort(includers)
	includers = slices.Compact(includers)
	// Files that define: all that the includers include, but the units.
	files := map[string]bool{}
	todo := slices.Clone(includers)
	for len(todo) > 0 {
		f := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, to := range g.Includes[f] {
			if !files[to] {
				files[to] = true
				todo = append(todo, to)
			}
		}
	}
	users := map[string][]*item{} // of an identifier
	where := map[*item]string{}
	for _, f := range sorted(files) {
		its, err := g.itemsOf(f)
		if err != nil {
			return err
		}
		for i := range its {
			where[&its[i]] = f
			for _, u := range its[i].uses {
				users[u] = append(users[u], &its[i])
			}
		}
	}
	nest := sorted(names)
	for len(nest) > 0 {
		n := nest[len(nest)-1]
		nest = nest[:len(nest)-1]
		for _, it := range users[n] {
			if it.kind == generates {
				for _, u := range g.Includers(where[it]) {
					if _, may := slices.BinarySearch(includers, u); may {
						reach[u] = true
					}
				}
				continue
			}
			if it.kind == layout && !declares(*it, n) {
				continue // it uses the name in the type of a member, which a new body of that name does not change
			}
			for _, d := range it.names {
				if !names[d] {
					names[d] = true
					nest = append(nest, d)
				}
			}
		}
	}
	for _, u := range includers {
		if reach[u] {
			continue
		}
		used, err := g.uses(u, names, map[string]bool{})
		if err != nil {
			return err
		}
		if used {
			reach[u] = true
		}
	}
	return nil
}

func declares(it item, name string) bool { return slices.Contains(it.names, name) }

// uses says whether a source file, or one that it includes and that is no
// header, has one of the names.
func (g *Graph) uses(f string, names, seen map[string]bool) (bool, error) {
	if seen[f] {
		return false, nil
	}
	seen[f] = true
	b, err := g.text(f)
	if err != nil {
		return false, err
	}
	for _, t := range tokens(string(include.ReplaceAll(b, nil))) {
		if names[t.text] {
			return true, nil
		}
	}
	for _, to := range g.Includes[f] {
		if strings.HasSuffix(to, ".h") {
			continue
		}
		if used, err := g.uses(to, names, seen); used || err != nil {
			return used, err
		}
	}
	return false, nil
}
