// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
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
	all := 0
	for _, c := range changes {
		in := g.Includers(c.File)
		all += len(in)
		names, fields, whole, err := g.defined(c)
		if err != nil {
			return nil, "", err
		}
		switch {
		case whole || len(in) <= few && len(names)+len(fields) > 0:
			for _, u := range in {
				reach[u] = true
			}
		case len(names)+len(fields) > 0: // each change by itself: a name of one means nothing to the includers of another
			if err := g.named(in, names, fields, reach); err != nil {
				return nil, "", err
			}
		}
	}
	return sorted(reach), fmt.Sprintf("%d of %d includers", len(reach), all), nil
}

// few includers are all taken: looking at names would save nothing, and the
// names of a private header lead far.
const few = 5

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
func (g *Graph) defined(c Change) (names map[string]bool, fields []field, whole bool, err error) {
	its, err := g.itemsOf(c.File)
	if err != nil {
		return nil, nil, false, err
	}
	b, err := g.text(c.File)
	if err != nil {
		return nil, nil, false, err
	}
	names = map[string]bool{}
	lines := strings.Split(string(b), "\n")
	for _, it := range its {
		removed, inserted := c.within(it)
		if len(removed)+len(inserted) == 0 {
			continue
		}
		switch it.kind {
		case layout: // by removed members: no old text can use new ones
			var text strings.Builder
			for _, l := range removed {
				if l <= len(lines) {
					text.WriteString(lines[l-1] + "\n")
				}
			}
			for _, n := range members(text.String()) {
				for _, tag := range it.names {
					fields = append(fields, field{n, tag})
				}
			}
		case condition:
			whole = whole || !c.balanced(its, it)
		case generates:
			whole = true
		case blank:
		default:
			for _, n := range it.names {
				names[n] = true
			}
		}
	}
	// What stands between two old items is items of its own. Where it takes the
	// place of an item's end, only whole functions and macros in it are.
	for _, n := range c.Inserted {
		if slices.ContainsFunc(its, func(it item) bool { return n.inside(it) }) {
			continue
		}
		replaces := slices.Contains(c.Removed, n.Before-1)
		added := parse(strings.Join(n.Lines, "\n"))
		for _, it := range added {
			switch {
			case it.kind == condition:
				whole = whole || !balanced(added)
			case it.kind == generates:
				whole = true
			case it.kind == blank, replaces && it.function == "" && it.directive != "define":
			case replaces && it.function != "":
				names[it.function] = true
			default: // a new type, or the old one, whose lines were removed
				for _, n := range it.names {
					names[n] = true
				}
			}
		}
	}
	for k := range keywords {
		delete(names, k)
	}
	return names, fields, whole, nil
}

// keywords of C that look like names where a piece of text begins in the
// middle of an item (C11, 6.4.1).
var keywords = func() map[string]bool {
	m := map[string]bool{}
	for k := range strings.FieldsSeq("auto break case char const continue default do double else enum extern float for goto if inline int long register " +
		"restrict return short signed sizeof static struct switch typedef union unsigned void volatile while bool true false NULL") {
		m[k] = true
	}
	return m
}()

// field is a member of a type. Its name alone means nothing: those who use it
// name the type too, or take it from a function that does.
type field struct{ member, tag string }

// within lists the lines of an item that are removed, and the text that is put
// inside it.
func (c Change) within(it item) (removed []int, inserted []string) {
	for _, l := range c.Removed {
		if l >= it.first && l <= it.last {
			removed = append(removed, l)
		}
	}
	for _, n := range c.Inserted {
		if n.inside(it) {
			inserted = append(inserted, n.Lines...)
		}
	}
	return removed, inserted
}

func (n Insertion) inside(it item) bool { return n.Before > it.first && n.Before <= it.last }

// balanced says whether a condition is removed together with all that belongs
// to it: then only the names between matter.
func (c Change) balanced(its []item, it item) bool {
	first, last := it.first, it.last
	for slices.Contains(c.Removed, first-1) {
		first--
	}
	for slices.Contains(c.Removed, last+1) {
		last++
	}
	return balanced(slices.DeleteFunc(slices.Clone(its), func(i item) bool { return i.first < first || i.last > last }))
}

// balanced says whether conditions begin and end within some items.
func balanced(its []item) bool {
	depth := 0
	for _, it := range its {
		switch it.directive {
		case "if", "ifdef", "ifndef":
			depth++
		case "elif", "else":
			if depth == 0 {
				return false
			}
		case "endif":
			if depth--; depth < 0 {
				return false
			}
		case "", "define", "include":
		default: // #undef, #pragma and such reach what follows
			return false
		}
	}
	return depth == 0
}

// Brings lists the names that a change defines anew in a file: functions,
// variables, macros, types, members, enumerators. old is the file's text.
func Brings(old string, c Change) []string {
	its := parse(old)
	had := map[string]bool{}
	for _, n := range Identifiers(old) {
		had[n] = true
	}
	fresh := map[string]bool{}
	source := strings.HasSuffix(c.File, ".c")
	for _, n := range c.Inserted {
		text := comment.ReplaceAllString(strings.Join(n.Lines, "\n"), "")
		// Diff may begin a new function with the end of the one before it, so
		// heads are found by their lines.
		for _, m := range head.FindAllStringSubmatch(text, -1) {
			static := strings.HasPrefix(m[0], "static ")
			if !had[m[1]] && !keywords[m[1]] && (!source || !static) {
				fresh[m[1]] = true
			}
		}
		i := slices.IndexFunc(its, func(it item) bool { return n.inside(it) })
		if source || i >= 0 && its[i].kind == other && its[i].body > 0 && n.Before > its[i].body && !slices.Contains(its[i].uses, "enum") {
			continue // of a source file others see only its functions; inside of one there is nothing to see
		}
		for _, it := range parse(text) {
			for _, name := range it.names {
				if !had[name] {
					fresh[name] = true
				}
			}
		}
		for _, m := range pointer.FindAllStringSubmatch(text, -1) {
			if !had[m[1]] {
				fresh[m[1]] = true
			}
		}
	}
	return sorted(fresh)
}

// members lists the names that a part of a type declares.
func members(text string) []string {
	var out []string
	ts := tokens(text)
	for i, t := range ts {
		if identifier(t.text) && i+1 < len(ts) && slices.Contains([]string{";", ",", "[", ":", "="}, ts[i+1].text) {
			out = append(out, t.text)
		}
	}
	for _, m := range pointer.FindAllStringSubmatch(text, -1) {
		out = append(out, m[1])
	}
	return out
}

// head finds the first line of a function, at the left margin.
var head = regexp.MustCompile(`(?m)^[A-Za-z_][^;={}()\n]*?\b([A-Za-z_]\w*)\([^;\n]*$`)

// comment finds the lines of a comment that began before.
var comment = regexp.MustCompile(`(?m)^[ \t]*(?:/\*|\*/|\*[ \t]|\*$).*$`)

// pointer finds the name of a pointer to a function.
var pointer = regexp.MustCompile(`\(\s*\*\s*([A-Za-z_]\w*)\s*\)\s*\(`)

// Signatures lists the functions whose declaration a change touches, or whose
// head it does.
func Signatures(old string, c Change) []string {
	found := map[string]bool{}
	for _, it := range parse(old) {
		if it.kind != other || it.directive != "" {
			continue
		}
		removed, inserted := c.within(it)
		head := slices.ContainsFunc(removed, func(l int) bool { return it.body == 0 || l <= it.body }) ||
			it.body == 0 && len(inserted) > 0
		if head && it.function != "" {
			found[it.function] = true
		}
	}
	return sorted(found)
}

// named adds the includers that use one of the names, after these were
// completed with every name whose definition uses one.
func (g *Graph) named(includers []string, names map[string]bool, fields []field, reach map[string]bool) error {
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
	for _, f := range fields {
		for _, it := range users[f.member] {
			if it.kind == other && slices.Contains(it.uses, f.tag) {
				for _, n := range it.names {
					names[n] = true
				}
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
			if it.kind == layout && !slices.Contains(it.names, n) {
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
		used, err := g.uses(u, names, fields, map[string]bool{})
		if err != nil {
			return err
		}
		if used {
			reach[u] = true
		}
	}
	return nil
}

// uses says whether a source file, or one that it includes and that is no
// header, has one of the names.
func (g *Graph) uses(f string, names map[string]bool, fields []field, seen map[string]bool) (bool, error) {
	if seen[f] {
		return false, nil
	}
	seen[f] = true
	have, err := g.words(f)
	if err != nil {
		return false, err
	}
	has := func(word string) bool {
		_, ok := slices.BinarySearch(have, hash(word))
		return ok
	}
	for n := range names {
		if has(n) {
			return true, nil
		}
	}
	for _, fd := range fields {
		if has(fd.member) && has(fd.tag) {
			return true, nil
		}
	}
	for _, to := range g.Includes[f] {
		if strings.HasSuffix(to, ".h") {
			continue
		}
		if used, err := g.uses(to, names, fields, seen); used || err != nil {
			return used, err
		}
	}
	return false, nil
}

// words are the hashes of the words of a source file, sorted. Two words of one
// hash make the answer too large, never too small; 4 bytes a word keep a whole
// kernel's in 20 MB.
func (g *Graph) words(f string) ([]uint32, error) {
	if w, ok := g.hashes[f]; ok {
		return w, nil
	}
	b, err := g.text(f)
	if err != nil {
		return nil, err
	}
	var w []uint32
	for _, t := range tokens(string(include.ReplaceAll(b, nil))) {
		w = append(w, hash(t.text))
	}
	slices.Sort(w)
	w = slices.Clip(slices.Compact(w))
	g.hashes[f] = w
	return w, nil
}

func hash(word string) uint32 {
	h := uint32(2166136261) // FNV-1a
	for i := range len(word) {
		h = (h ^ uint32(word[i])) * 16777619
	}
	return h
}
