// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"regexp"
	"slices"
	"strings"
)

// Outline is what a change of a file does outside of function bodies, as far
// as it can reach the layout of a data type.
type Outline struct {
	Types []Definition // changed, new or gone
	Names []string     // of macros, enumerators, typedefs and variables: a type elsewhere may be made with them
	Whole bool         // a condition, an #include or a macro that may make types: no name tells which
}

// Definition is the text that defines a type.
type Definition struct {
	File  string
	Names []string
	// Fixed says that the text means the same in every unit that reads it: it
	// depends on no condition but the kernel's configuration.
	Fixed bool
}

// Empty says that no layout can have changed.
func (o Outline) Empty() bool { return len(o.Types)+len(o.Names) == 0 && !o.Whole }

// Compare finds what differs between two texts of one file. Comments, the
// order of declarations, prototypes and functions are no difference.
func Compare(file, old, text string) Outline {
	before, after := outlined(file, old), outlined(file, text)
	var out Outline
	count := map[string]int{}
	for _, p := range before.pieces {
		count[p.text]++
	}
	for _, p := range after.pieces {
		count[p.text]--
	}
	for _, p := range slices.Concat(before.pieces, after.pieces) {
		if count[p.text] != 0 {
			out.add(file, p)
		}
	}
	// Where a name is undefined or packing is set, the order matters too.
	out.Whole = out.Whole || (before.ordered || after.ordered) && !slices.Equal(before.shape(), after.shape())
	out.Whole = out.Whole || !slices.Equal(before.directives, after.directives)
	slices.Sort(out.Names)
	out.Names = slices.Compact(out.Names)
	return out
}

// piece is one item, told apart by its tokens and the conditions around it.
type piece struct {
	ts    []token
	text  string
	role  role
	fixed bool
}

type role int

const (
	harmless role = iota // functions, prototypes, macros that only register something
	types                // defines a struct, a union or an enum
	named                // a macro, typedef or variable
	unknown              // a macro at the outermost level that may make anything
	order                // #include, #undef, #pragma
)

type outline struct {
	pieces     []piece
	directives []string // #include, #undef and #pragma, in their order
	ordered    bool
}

// shape lists all that is no function, in its order.
func (o outline) shape() []string {
	var out []string
	for _, p := range o.pieces {
		if p.role != harmless {
			out = append(out, p.text)
		}
	}
	return out
}

func (o *Outline) add(file string, p piece) {
	switch p.role {
	case types:
		names, enumerators := defines(p.ts)
		o.Types = append(o.Types, Definition{file, names, p.fixed})
		o.Names = append(o.Names, enumerators...)
	case named:
		o.Names = append(o.Names, namesOf(p.ts)...)
	case unknown, order:
		o.Whole = true
	case harmless:
	}
	if p.role != named { // macros that are defined within a function or a type
		o.Names = append(o.Names, innerMacros(p.ts)...)
	}
}

func outlined(file, text string) outline {
	var o outline
	var conditions []string
	all := pieces(text)
	guarded, guard := guardOf(all)
	own := guarded || strings.HasSuffix(file, ".c")
	for _, ts := range all {
		if ts[0].text == "#" && len(ts) > 1 {
			switch d := ts[1].text; d {
			case "if", "ifdef", "ifndef":
				conditions = append(conditions, join(ts[1:]))
				continue
			case "else", "elif":
				if n := len(conditions); n > 0 {
					conditions[n-1] += " " + join(ts[1:])
				}
				continue
			case "endif":
				conditions = conditions[:max(0, len(conditions)-1)]
				continue
			case "include", "undef", "pragma":
				o.directives = append(o.directives, join(ts)+" if "+strings.Join(conditions, " and "))
				o.ordered = o.ordered || d != "include"
			}
		}
		p := piece{ts: ts, role: roleOf(ts)}
		p.text = join(ts) + " if " + strings.Join(conditions, " and ")
		p.fixed = own && !slices.ContainsFunc(conditions, func(c string) bool { return !configured(c, guard) })
		for i, t := range ts { // conditions within the type
			if i > 0 && t.text == "#" {
				end := i
				for end < len(ts) && ts[end].text != "\n" {
					end++
				}
				p.fixed = p.fixed && configured(join(ts[i+1:end]), guard)
			}
		}
		o.pieces = append(o.pieces, p)
	}
	return o
}

// guardOf finds the name that keeps a header from being read twice. One
// without is made to be read several times, each time with another meaning.
func guardOf(all [][]token) (bool, string) {
	if len(all) < 2 || len(all[0]) < 3 || len(all[1]) < 3 || all[0][0].text != "#" || all[1][0].text != "#" {
		return false, ""
	}
	name := all[1][2].text
	if all[1][1].text != "define" || all[0][len(all[0])-1].text != name && !slices.ContainsFunc(all[0], func(t token) bool { return t.text == name }) {
		return false, ""
	}
	return true, name
}

var (
	conditionWord = regexp.MustCompile(`[A-Za-z_]\w*`)
	// sameForAll are what a condition may ask and get one answer in all units
	// of a kernel build. IS_REACHABLE and MODULE are not among them.
	sameForAll = regexp.MustCompile(`^(if|ifdef|ifndef|else|elif|endif|defined|IS_ENABLED|IS_BUILTIN|CONFIG_\w+|__KERNEL__|__ASSEMBLY__|__x86_64__|__i386__|` +
		`BITS_PER_LONG|__BITS_PER_LONG|PAGE_SIZE|PAGE_SHIFT|HZ|NR_CPUS|__(BIG|LITTLE)_ENDIAN\w*|__CHECKER__|__cplusplus|[uUlL]+)$`)
)

func configured(condition, guard string) bool {
	for _, w := range conditionWord.FindAllString(condition, -1) {
		if w != guard && !sameForAll.MatchString(w) {
			return false
		}
	}
	return true
}

func join(ts []token) string {
	var b strings.Builder
	for _, t := range ts {
		b.WriteString(t.text)
		b.WriteByte(' ')
	}
	return b.String()
}

// registers are macros at the outermost level that make no type.
var registers = regexp.MustCompile(`^(EXPORT_\w+|MODULE_\w+|module_\w+|\w+_initcall\w*|static_assert|_Static_assert|DEFINE_(RAW_)?SPINLOCK|DEFINE_MUTEX|DEFINE_RWLOCK|` +
	`(DEFINE|DECLARE)_(PER_CPU|STATIC_KEY|WAIT_QUEUE_HEAD|STATIC_CALL)\w*|LIST_HEAD|HLIST_HEAD|SYSCALL_DEFINE\w|COMPAT_SYSCALL_DEFINE\w|BUILD_BUG_ON|ALLOW_ERROR_INJECTION|` +
	`NOKPROBE_SYMBOL|early_param|__setup\w*|core_param|TRACEPOINT_\w+|EXPORT_TRACEPOINT_\w+)$`)

func roleOf(ts []token) role {
	if ts[0].text == "#" {
		switch {
		case len(ts) > 2 && ts[1].text == "define":
			return named
		case len(ts) > 1 && slices.Contains([]string{"include", "undef", "pragma"}, ts[1].text):
			return order
		}
		return harmless
	}
	if slices.ContainsFunc(generators, func(g string) bool { return strings.HasPrefix(ts[0].text, g) && g != "SYSCALL_DEFINE" }) {
		return unknown
	}
	if names, _ := defines(ts); names != nil {
		return types
	}
	if callOnly(ts) {
		if registers.MatchString(ts[0].text) {
			return harmless
		}
		return unknown
	}
	depth, paren, body, assigned := 0, false, false, false
	for _, t := range ts {
		switch t.text {
		case "(", "[", "{":
			paren = paren || depth == 0 && t.text == "("
			body = body || depth == 0 && t.text == "{"
			depth++
		case ")", "]", "}":
			depth = max(0, depth-1)
		case "=":
			assigned = assigned || depth == 0
		}
	}
	if ts[0].text != "typedef" && paren && !assigned {
		return harmless // a function or its prototype
	}
	if len(ts) == 1 || ts[0].text == "struct" && len(ts) <= 3 && !body { // ";", "struct x;"
		return harmless
	}
	return named
}

// namesOf are the names that a macro, typedef or variable goes by.
func namesOf(ts []token) []string {
	if ts[0].text == "#" {
		if len(ts) > 2 && identifier(ts[2].text) {
			return []string{ts[2].text}
		}
		return nil
	}
	if ts[0].text == "typedef" && slices.ContainsFunc(ts, func(t token) bool { return t.text == "(" }) {
		return identifiers(ts) // of a function: the name is inside of parentheses
	}
	return declaration(ts).names
}

func innerMacros(ts []token) []string {
	var out []string
	for i := 1; i+2 < len(ts); i++ {
		if ts[i].text == "#" && ts[i+1].text == "define" && identifier(ts[i+2].text) {
			out = append(out, ts[i+2].text)
		}
	}
	return out
}

// defines lists the types that a piece defines, with a name for each, "" for
// one without, and the enumerators.
func defines(ts []token) (names, enumerators []string) {
	for i := range ts {
		k := ts[i].text
		if k != "struct" && k != "union" && k != "enum" {
			continue
		}
		tag, body := bodyOf(ts, i+1)
		if body == 0 {
			continue
		}
		names = append(names, tag)
		if k != "enum" {
			continue
		}
		depth := 0
		for _, t := range ts[body:] {
			if t.text == "{" {
				depth++
			} else if t.text == "}" {
				if depth--; depth == 0 {
					break
				}
			} else if identifier(t.text) {
				enumerators = append(enumerators, t.text)
			}
		}
	}
	if names != nil && ts[0].text == "typedef" {
		names = append(names, declaration(ts).names...)
	}
	return names, enumerators
}

// bodyOf finds the brace of a type's body after its keyword: attributes may
// stand around the tag, which a macro may make.
func bodyOf(ts []token, i int) (tag string, body int) {
	for i < len(ts) {
		t := ts[i].text
		if t == "{" {
			return tag, i
		}
		if !identifier(t) {
			return "", 0
		}
		if !strings.HasPrefix(t, "__") && !slices.Contains(attributes, t) {
			if tag != "" {
				return "", 0 // a variable or function of that type
			}
			tag = t
		}
		i++
		if i < len(ts) && ts[i].text == "(" {
			for depth := 0; i < len(ts); i++ {
				if ts[i].text == "(" {
					depth++
				} else if ts[i].text == ")" {
					if depth--; depth == 0 {
						break
					}
				}
			}
			i++
		}
	}
	return "", 0
}
