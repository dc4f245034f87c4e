// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"context"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Delta is all that differs between two sources in what one kernel build is
// compiled from.
type Delta struct {
	changes map[string]*change
	added   map[string]bool     // files that only the newer source has
	reach   map[string][]string // source files of the kernel build that a file is compiled into
	byBase  map[string][]string // changed and added files by last path element

	makers  map[string][]node // name, to the hunks that define it
	heads   map[string][]node // function, to the hunks that change its declaration
	callers map[string][]node // function, to the hunks that change a call of it
}

// Includers says which source files of the kernel build a file is compiled
// into, sorted; none means that the kernel build does not have it.
type Includers func(file string) []string

// Trees are the two sources.
type Trees struct {
	Old     string
	Patched string // files of Old as the queue leaves them; the others are not there
	New     string
}

func (t Trees) old(file string) (string, error) {
	p := filepath.Join(t.Patched, file)
	if ok, err := exists(p); t.Patched != "" && (ok || err != nil) {
		return p, err
	}
	return filepath.Join(t.Old, file), nil
}

// Compare reads the files that differ. files lists what either source may
// have, relative to both folders; what neither has is passed over.
func Compare(ctx context.Context, trees Trees, files []string, includers Includers) (*Delta, error) {
	d := &Delta{changes: map[string]*change{}, added: map[string]bool{}, reach: map[string][]string{}, byBase: map[string][]string{},
		makers: map[string][]node{}, heads: map[string][]node{}, callers: map[string][]node{}}
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		a, err := trees.old(f)
		if err != nil {
			return nil, err
		}
		b := filepath.Join(trees.New, f)
		was, err := exists(a)
		if err != nil {
			return nil, err
		}
		is, err := exists(b)
		if err != nil {
			return nil, err
		}
		switch {
		case !is: // removed, or in neither
			continue
		case !was:
			d.added[f] = true
			d.byBase[path.Base(f)] = append(d.byBase[path.Base(f)], f)
			continue
		}
		same, err := sameContent(a, b)
		if err != nil {
			return nil, err
		}
		if same {
			continue
		}
		d.byBase[path.Base(f)] = append(d.byBase[path.Base(f)], f)
		d.reach[f] = includers(f)
		d.changes[f] = &change{file: f}
		if len(d.reach[f]) == 0 { // that it differs is all that matters
			continue
		}
		if d.changes[f], err = compareFile(ctx, a, b, f); err != nil {
			return nil, err
		}
	}
	d.index()
	return d, nil
}

// index finds what each identifier is brought in by. Only files of this
// kernel build count.
func (d *Delta) index() {
	for f, c := range d.changes {
		if len(d.reach[f]) == 0 {
			continue
		}
		for i, h := range c.hunks {
			n := node{f, i}
			for _, name := range h.brings {
				d.makers[name] = append(d.makers[name], n)
			}
			for _, name := range h.heads {
				d.heads[name] = append(d.heads[name], n)
			}
			for _, name := range h.calls {
				d.callers[name] = append(d.callers[name], n)
			}
		}
	}
}

// Changed lists the files that differ, sorted; built says whether this kernel
// build has them.
func (d *Delta) Changed() (built, other []string) {
	for f := range d.changes {
		if len(d.reach[f]) > 0 {
			built = append(built, f)
		} else {
			other = append(other, f)
		}
	}
	slices.Sort(built)
	slices.Sort(other)
	return built, other
}

// find maps a file as a CVE record names it to changed files: itself, or, as
// files move between series, the only one whose last path elements agree.
func (d *Delta) find(file string) string {
	if d.changes[file] != nil || d.added[file] {
		return file
	}
	same := d.byBase[path.Base(file)]
	var best []string
	parent := path.Base(path.Dir(file))
	for _, f := range same {
		if path.Base(path.Dir(f)) == parent {
			best = append(best, f)
		}
	}
	if len(best) == 1 {
		return best[0]
	}
	return ""
}

// closure is the smallest set of hunks that holds all that changes in some
// files and what those hunks need: names that other hunks bring in, and
// declarations that change together with their uses. Of a source file all
// hunks are taken, because nobody knows where one commit ends and the next
// begins; of a header that is only needed, the hunks that bring in the names.
func (d *Delta) closure(files []string) nodes {
	set := nodes{}
	var todo []node
	add := func(n node) {
		if !set[n] {
			set[n] = true
			todo = append(todo, n)
		}
	}
	whole := func(f string) {
		for i := range d.changes[f].hunks {
			add(node{f, i})
		}
	}
	for _, f := range files {
		if d.changes[f] != nil && len(d.reach[f]) > 0 {
			whole(f)
		}
	}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, m := range d.needs(n) {
			if strings.HasSuffix(m.file, ".h") {
				add(m)
			} else {
				whole(m.file)
			}
		}
	}
	return set
}

// needs lists the hunks that one hunk does not work without: those that define
// a name that is new to it, and where the declaration of a function changes,
// all that change a call of it.
func (d *Delta) needs(n node) []node {
	h := d.changes[n.file].hunks[n.hunk]
	var out []node
	add := func(by map[string][]node, names []string) {
		for _, name := range names {
			for _, m := range by[name] {
				if m != n && d.meet(n.file, m.file) {
					out = append(out, m)
				}
			}
		}
	}
	add(d.makers, h.fresh)
	add(d.heads, h.calls)
	add(d.callers, h.heads)
	return out
}

// meet says whether two files are compiled together, or are both source files
// that the linker brings together.
func (d *Delta) meet(a, b string) bool {
	if !strings.HasSuffix(a, ".h") && !strings.HasSuffix(b, ".h") {
		return true
	}
	x, y := d.reach[a], d.reach[b]
	if len(x) > len(y) {
		x, y = y, x
	}
	for _, u := range x {
		if _, ok := slices.BinarySearch(y, u); ok {
			return true
		}
	}
	return false
}
