// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
)

// A file that is refused as a whole often holds several fixes, and one of them
// is why. So what is refused is tried once more in parts: hunks of one function,
// and hunks that share a name which is new or goes away, stay together. The
// parts that pass go into the livepatch. A CVE counts only if the words of its
// record name functions or identifiers of parts that pass, and of none that is
// refused. That is evidence, not proof: the ledger says which CVEs stand by
// words, and what was left out of their files, so that a reviewer looks.

// part numbers the parts of a file: hunks with the same number belong together.
func (c *change) part() []int {
	if c.parts != nil || len(c.hunks) == 0 {
		return c.parts
	}
	p := make([]int, len(c.hunks))
	for i := range p {
		p[i] = i
	}
	var top func(i int) int
	top = func(i int) int {
		if p[i] != i {
			p[i] = top(p[i])
		}
		return p[i]
	}
	first := map[string]int{}
	for i, h := range c.hunks {
		var marks []string
		for _, at := range h.in {
			marks = append(marks, fmt.Sprint("in ", at.First))
		}
		marks = append(append(marks, h.fresh...), h.gone...)
		for _, m := range marks {
			if j, seen := first[m]; seen {
				p[top(i)] = top(j)
			} else {
				first[m] = i
			}
		}
	}
	for i := range p {
		p[i] = top(i)
	}
	c.parts = p
	return p
}

// partOf lists the hunks of a file that belong together with one of them.
func (d *Delta) partOf(n node) []node {
	p := d.changes[n.file].part()
	var out []node
	for i := range p {
		if p[i] == p[n.hunk] {
			out = append(out, node{n.file, i})
		}
	}
	return out
}

// closureOf is the smallest set of parts that holds one and what it needs.
func (d *Delta) closureOf(start node) nodes {
	set := nodes{}
	todo := d.partOf(start)
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if set[n] {
			continue
		}
		set[n] = true
		for _, m := range d.needs(n) {
			if strings.HasSuffix(m.file, ".h") {
				todo = append(todo, m)
			} else {
				todo = append(todo, d.partOf(m)...)
			}
		}
	}
	return set
}

// parts tries what was refused in parts, and gives those that pass to the CVEs
// whose words name them. It returns the parts that pass and fix something.
func (r *runner) parts(ctx context.Context, lots []*lot) ([]*lot, error) {
	byKey := map[string]*lot{}
	of := map[string][]*lot{} // own file, to its parts
	for _, l := range lots {
		if len(l.refused) == 0 {
			continue
		}
		for _, f := range l.own() {
			if of[f] != nil {
				continue
			}
			for i, p := range r.delta.changes[f].part() {
				if p != i {
					continue
				}
				set := r.delta.closureOf(node{f, i})
				k := set.key()
				if byKey[k] == nil {
					byKey[k] = &lot{nodes: set, starts: nodes{}}
				}
				byKey[k].starts[node{f, i}] = true
				of[f] = append(of[f], byKey[k])
			}
		}
	}
	var all []*lot
	for _, k := range sortedKeys(byKey) {
		all = append(all, byKey[k])
	}
	if len(all) == 0 {
		return nil, nil
	}
	r.Tell("what was refused, in %d parts", len(all))
	for _, p := range all {
		var err error
		if p.sources, p.refused, err = r.reach(ctx, p); err != nil {
			return nil, err
		}
	}
	passed, err := r.together(ctx, all)
	if err != nil {
		return nil, err
	}
	for _, l := range lots {
		if len(l.refused) > 0 {
			r.attribute(l, of)
		}
	}
	return slices.DeleteFunc(passed, func(p *lot) bool { return len(p.cves) == 0 || p.inert }), nil
}

// own lists the changed files that the records of a lot's CVEs name.
func (l *lot) own() []string {
	var out []string
	for _, fs := range l.files {
		out = append(out, fs...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// attribute decides which CVEs of a refused lot stand by the words of their
// records.
func (r *runner) attribute(l *lot, of map[string][]*lot) {
	for _, id := range l.cves {
		said := identifiersIn(r.words[id])
		var parts []*lot
		for _, f := range l.files[id] {
			for _, p := range of[f] {
				if !slices.Contains(parts, p) {
					parts = append(parts, p)
				}
			}
		}
		names := map[*lot][]string{}
		for _, level := range []func(*lot) []string{r.functionsOf, r.identifiersOf} {
			for _, p := range parts {
				for _, n := range level(p) {
					if said[n] && !slices.Contains(names[p], n) {
						names[p] = append(names[p], n)
					}
				}
			}
			if len(names) > 0 {
				break
			}
		}
		w := byWords{}
		stands := false
		for _, p := range parts {
			switch {
			case len(p.refused) > 0:
				w.left = append(w.left, r.functionsOf(p)...)
				if len(names[p]) > 0 {
					w.refused = p.refused
				}
			case len(names[p]) > 0 && !p.inert:
				stands = true
				w.names = append(w.names, names[p]...)
				w.parts = append(w.parts, p)
			}
		}
		if !stands || w.refused != nil {
			continue
		}
		slices.Sort(w.names)
		slices.Sort(w.left)
		w.names, w.left = slices.Compact(w.names), slices.Compact(w.left)
		for _, p := range parts {
			if len(p.refused) == 0 {
				p.cves = append(p.cves, id)
				p.left = append(p.left, w.left...)
			}
		}
		if l.stands == nil {
			l.stands = map[cve.ID]byWords{}
		}
		l.stands[id] = w
	}
}

// byWords is why a CVE counts although its files are refused as a whole.
type byWords struct {
	names   []string // that its record says, in the parts that are in
	left    []string // functions of the parts that are not
	parts   []*lot   // that the record names
	refused []build.Refusal
}

// hold says whether all that the record names is still in.
func (w byWords) hold() bool {
	return !slices.ContainsFunc(w.parts, func(p *lot) bool { return len(p.refused) > 0 || p.inert })
}

// functionsOf lists the functions that a part changes or brings, in the files
// that it was made for.
func (r *runner) functionsOf(p *lot) []string {
	var out []string
	r.each(p, func(h hunk) {
		for _, at := range h.in {
			if at.Function != "" {
				out = append(out, at.Function)
			}
		}
		out = append(out, h.defines...)
	})
	return out
}

// identifiersOf lists all names on the lines that a part changes.
func (r *runner) identifiersOf(p *lot) []string {
	var out []string
	r.each(p, func(h hunk) { out = append(out, h.mentions...) })
	return out
}

func (r *runner) each(p *lot, do func(hunk)) {
	for start := range p.starts {
		for _, n := range r.delta.partOf(start) {
			do(r.delta.changes[n.file].hunks[n.hunk])
		}
	}
}

var (
	cName   = regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*`)
	calling = regexp.MustCompile(`([A-Za-z_][A-Za-z0-9_]*)\(\)`)
)

// identifiersIn finds names of C in prose: words with an underscore, and what
// is written like a call.
func identifiersIn(text string) map[string]bool {
	out := map[string]bool{}
	for _, n := range cName.FindAllString(text, -1) {
		if strings.Contains(strings.Trim(n, "_"), "_") {
			out[n] = true
		}
	}
	for _, m := range calling.FindAllStringSubmatch(text, -1) {
		out[m[1]] = true
	}
	return out
}
