// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"fmt"
	"slices"
)

// Confined is what the text of a .c file says of a type whose objects never
// leave the calls that make them.
type Confined struct {
	Births  []string            // functions that have an object of the type as a variable, sorted
	Users   map[string][]string // functions of the file that mention another one, by the other
	Defined map[string]bool     // functions of the file
}

// UnknownUser stands for a function that a macro makes.
const UnknownUser = "?"

// Confine shows that all objects of a struct live in variables of functions,
// and that their addresses go only to functions of the same file as pointers
// to that type; else why says what stands against it. It goes by a short list
// of what may be done with such a variable and refuses everything else:
//
//   - the struct is defined at the outermost level, has no pointer to itself,
//     and no other type, macro, typedef or variable of the file mentions it;
//   - a function may have a variable "struct tag v" and use it as "v.member"
//     and, as a whole argument, "&v"; a static function may have a parameter
//     "struct tag *p" and use it as "p->member" and, as a whole argument, "p";
//   - the argument goes to a parameter "struct tag *" of a static function of
//     the file whose address nobody takes.
//
// So there is no cast, no sizeof, no typeof, no container_of, no allocation,
// no table, no assignment of the pointer: the compiler gives it no other way
// out. The caller must see to it that no other file mentions the struct.
func Confine(text, tag string) (c Confined, why string) {
	k := confine{tag: tag, out: Confined{Users: map[string][]string{}, Defined: map[string]bool{}}, takes: map[string][]int{}}
	all := pieces(text)
	var fs []function
	defined := false
	for _, ts := range all {
		defined = defined || at(ts, 0) == "struct" && at(ts, 1) == tag && at(ts, 2) == "{"
		f, is := functionOf(ts)
		if is {
			fs = append(fs, f)
		}
		switch first := slices.IndexFunc(ts, func(t token) bool { return t.text == tag }); {
		case first < 0:
		case is:
			if why := k.head(f); why != "" {
				return c, why
			}
		case !k.defines(ts):
			return c, fmt.Sprintf("line %d mentions it outside of functions", ts[first].line)
		}
	}
	if !defined {
		return c, "it is not defined at the outermost level of the file"
	}
	for i := range fs {
		if why := k.body(&fs[i]); why != "" {
			return c, why
		}
	}
	if why := k.macros(all, fs); why != "" {
		return c, why
	}
	for _, ts := range all {
		f, is := functionOf(ts)
		if !is { // a table, or a macro: the address is taken
			for _, t := range ts {
				if k.takes[t.text] != nil {
					return c, fmt.Sprintf("the address of %s, which gets a pointer to it, is taken in line %d", t.text, t.line)
				}
				if k.out.Defined[t.text] && !table(ts) && !registers.MatchString(ts[0].text) {
					k.out.Users[t.text] = append(k.out.Users[t.text], UnknownUser)
				}
			}
			continue
		}
		if why := k.calls(f); why != "" {
			return c, why
		}
	}
	slices.Sort(k.out.Births)
	k.out.Births = slices.Compact(k.out.Births)
	return k.out, ""
}

// table says whether a piece is a variable with its value.
func table(ts []token) bool {
	for _, t := range ts {
		if t.text == "=" {
			return true
		}
		if t.text == "{" || t.text == "(" || t.text == "#" {
			return false
		}
	}
	return false
}

type confine struct {
	tag   string
	out   Confined
	takes map[string][]int // static functions, to the parameters that are pointers to the type
}

// function is a function, or its prototype.
type function struct {
	name       string
	head, body []token // the head from the first word to the closing parenthesis
	open       int     // of the parameters, in head
	values     []string
	pointers   []string
}

// functionOf says whether a piece is a function that C names, not a macro.
func functionOf(ts []token) (function, bool) {
	if ts[0].text == "#" || ts[0].text == "typedef" || callOnly(ts) {
		return function{}, false
	}
	for i, t := range ts {
		switch t.text {
		case "=", "{", "[", ";":
			return function{}, false
		case "(":
			if i == 0 || !identifier(ts[i-1].text) || slices.Contains(attributes, ts[i-1].text) {
				return function{}, false // an attribute before the name: nothing that we follow
			}
			end := afterCall(ts, i)
			f := function{name: ts[i-1].text, head: ts[:end], open: i}
			for j := end; j < len(ts); j++ {
				if ts[j].text == "{" {
					f.body = ts[j:]
					return f, true
				}
			}
			return f, ts[len(ts)-1].text == ";"
		}
	}
	return function{}, false
}

// afterCall is the index after the parenthesis that closes the one at i.
func afterCall(ts []token, i int) int {
	depth := 0
	for ; i < len(ts); i++ {
		switch ts[i].text {
		case "(":
			depth++
		case ")":
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return i
}

func at(ts []token, i int) string {
	if i < 0 || i >= len(ts) {
		return ""
	}
	return ts[i].text
}

// defines says whether a piece is the struct's own definition, or its
// announcement.
func (k *confine) defines(ts []token) bool {
	if at(ts, 0) != "struct" || at(ts, 1) != k.tag || len(ts) < 3 || ts[len(ts)-1].text != ";" {
		return false
	}
	if slices.ContainsFunc(ts[2:], func(t token) bool { return t.text == k.tag || t.text == "typeof" || t.text == "__typeof__" }) {
		return false
	}
	return at(ts, 2) == ";" || at(ts, 2) == "{" && ts[len(ts)-2].text == "}"
}

// head reads the parameters of a function that mentions the type.
func (k *confine) head(f function) string {
	param := 0
	depth := 0
	for i, t := range f.head {
		switch t.text {
		case "(":
			depth++
		case ")":
			depth--
		case ",":
			if depth == 1 {
				param++
			}
		case k.tag:
			name, after := at(f.head, i+2), at(f.head, i+3)
			if at(f.head, i-1) != "struct" || depth != 1 || i < f.open || at(f.head, i+1) != "*" || !identifier(name) || after != "," && after != ")" {
				return fmt.Sprintf("%s has or gives it otherwise than as a pointer that it gets", f.name)
			}
			if !slices.ContainsFunc(f.head, func(t token) bool { return t.text == "static" }) {
				return fmt.Sprintf("%s gets a pointer to it and is not static", f.name)
			}
			if had := k.takes[f.name]; !slices.Contains(had, param) {
				k.takes[f.name] = append(had, param)
			}
		}
	}
	return ""
}

// body finds the variables of a function.
func (k *confine) body(f *function) string {
	if f.body == nil {
		return ""
	}
	k.out.Defined[f.name] = true
	for i, t := range f.head {
		if t.text == k.tag {
			f.pointers = append(f.pointers, at(f.head, i+2))
		}
	}
	for i, t := range f.body {
		if t.text != k.tag {
			continue
		}
		before, name, after := at(f.body, i-2), at(f.body, i+1), at(f.body, i+2)
		if at(f.body, i-1) != "struct" || before != "{" && before != ";" && before != "}" || !identifier(name) || after != ";" && after != "=" {
			return fmt.Sprintf("%s uses it otherwise than as a variable, line %d", f.name, t.line)
		}
		f.values = append(f.values, name)
		k.out.Births = append(k.out.Births, f.name)
	}
	return ""
}

// macros looks for macros that use a variable of such a function without
// being given it.
func (k *confine) macros(all [][]token, fs []function) string {
	for _, ts := range all {
		for i := 0; i+2 < len(ts); i++ {
			if ts[i].text != "#" || ts[i+1].text != "define" {
				continue
			}
			params := i + 3
			end := params
			if at(ts, params) == "(" {
				end = afterCall(ts, params)
			}
			for _, t := range ts[end:] {
				for _, f := range fs {
					if slices.Contains(slices.Concat(f.values, f.pointers), t.text) && !slices.ContainsFunc(ts[params:end], func(p token) bool { return p.text == t.text }) {
						return fmt.Sprintf("macro %s uses %s, which may be a variable of this type", ts[i+2].text, t.text)
					}
				}
			}
		}
	}
	return ""
}

// calls looks at all that a function does with its variables of the type, and
// with functions that get one.
func (k *confine) calls(f function) string {
	if why := k.body(&f); why != "" { // the variables again
		return why
	}
	for i, t := range f.body {
		prev, next := at(f.body, i-1), at(f.body, i+1)
		if prev == "." || prev == ">" && at(f.body, i-2) == "-" || !identifier(t.text) {
			continue // a member
		}
		if k.out.Defined[t.text] && t.text != f.name && !slices.Contains(k.out.Users[t.text], f.name) {
			k.out.Users[t.text] = append(k.out.Users[t.text], f.name)
		}
		if k.takes[t.text] != nil && next != "(" {
			return fmt.Sprintf("the address of %s, which gets a pointer to it, is taken in line %d", t.text, t.line)
		}
		value, pointer := slices.Contains(f.values, t.text), slices.Contains(f.pointers, t.text)
		switch {
		case !value && !pointer, prev == k.tag:
		case value && next == ".", pointer && next == "-" && at(f.body, i+2) == ">":
		case value && prev == "&" && k.given(f.body, i-1, i), pointer && k.given(f.body, i, i):
		default:
			return fmt.Sprintf("%s uses %s in line %d in a way that may let it out", f.name, t.text, t.line)
		}
	}
	return ""
}

// given says whether the tokens from i to j are a whole argument of a call,
// and its parameter is a pointer to the type.
func (k *confine) given(ts []token, i, j int) bool {
	if after := at(ts, j+1); after != "," && after != ")" {
		return false
	}
	if before := at(ts, i-1); before != "," && before != "(" {
		return false
	}
	param, depth := 0, 0
	for i--; i > 0; i-- {
		switch ts[i].text {
		case ")", "]", "}":
			depth++
		case ",":
			if depth == 0 {
				param++
			}
		case "(", "[", "{":
			if depth == 0 {
				return ts[i].text == "(" && slices.Contains(k.takes[ts[i-1].text], param)
			}
			depth--
		case ";":
			if depth == 0 {
				return false
			}
		}
	}
	return false
}
