// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"slices"
	"strings"
)

// item is one piece of a file at its outermost level: a directive of the
// preprocessor, or a declaration or definition.
type item struct {
	first, last int      // lines, from 1
	names       []string // that it defines; none where nobody can tell
	uses        []string // identifiers in it
	kind        kind
	body        int    // line of its first brace at the outermost level, 0 without
	directive   string // such as include, ifdef or define
	function    string // the name before the first parenthesis, of a function
}

type kind int

const (
	other     kind = iota // declarations, variables, functions: used by name
	layout                // a struct or union: its members are used without its name
	condition             // #if and such: what they change has no name
	generates             // macros called at the outermost level that make code of their own (TRACE_EVENT)
	blank                 // comments and #include
)

// token is a word of C, or one character.
type token struct {
	text string
	line int
}

// tokens splits C text: no comments, no white space; a string is one token. A
// directive of the preprocessor ends with the token "\n".
func tokens(text string) []token {
	var out []token
	line, directive := 1, false
	for i := 0; i < len(text); {
		c := text[i]
		switch {
		case c == '\n':
			if directive {
				out = append(out, token{"\n", line})
				directive = false
			}
			line++
			i++
		case c == '\\' && i+1 < len(text) && text[i+1] == '\n':
			line++
			i += 2
		case strings.HasPrefix(text[i:], "/*"):
			end := strings.Index(text[i+2:], "*/")
			if end < 0 {
				return out
			}
			line += strings.Count(text[i:i+2+end], "\n")
			i += end + 4
		case strings.HasPrefix(text[i:], "//"):
			end := strings.IndexByte(text[i:], '\n')
			if end < 0 {
				return out
			}
			i += end
		case c == '"' || c == '\'':
			j := i + 1
			for j < len(text) && text[j] != c && text[j] != '\n' {
				if text[j] == '\\' {
					j++
				}
				j++
			}
			j = min(j+1, len(text))
			out = append(out, token{text[i:j], line})
			i = j
		case word(c):
			j := i
			for j < len(text) && word(text[j]) {
				j++
			}
			out = append(out, token{text[i:j], line})
			i = j
		case c == ' ' || c == '\t' || c == '\r' || c == '\f':
			i++
		default:
			if c == '#' && (len(out) == 0 || out[len(out)-1].line != line || out[len(out)-1].text == "\n") {
				directive = true
			}
			out = append(out, token{string(c), line})
			i++
		}
	}
	return out
}

func word(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= 0x80
}

func identifier(s string) bool { return s != "" && word(s[0]) && (s[0] < '0' || s[0] > '9') }

// parse splits a file into its items. Unbalanced braces, as two halves of an
// #ifdef make them, end an item early or late; its names are all the same
// among those of some item, and its uses too.
func parse(text string) []item {
	var out []item
	for _, ts := range pieces(text) {
		if ts[0].text == "#" {
			out = append(out, directive(ts))
		} else {
			out = append(out, declaration(ts))
		}
	}
	return out
}

// pieces splits a file into the tokens of its items.
func pieces(text string) [][]token {
	ts := tokens(text)
	var out [][]token
	for i := 0; i < len(ts); {
		start := i
		if ts[i].text == "#" {
			for i < len(ts) && ts[i].text != "\n" {
				i++
			}
			out = append(out, ts[start:i])
			i++
			continue
		}
		depth := 0
		for ; i < len(ts); i++ {
			t := ts[i].text
			switch t {
			case "{", "(", "[":
				depth++
			case "}", ")", "]":
				depth = max(0, depth-1)
			}
			if depth > 0 {
				continue
			}
			if t == ";" || t == "}" && endsHere(ts, i) {
				i++
				break
			}
			// A macro's call without a semicolon: the next line begins at the
			// outermost level with something else.
			if t == ")" && i+1 < len(ts) && ts[i+1].line > ts[i].line && callOnly(ts[start:i+1]) {
				i++
				break
			}
		}
		out = append(out, ts[start:i])
	}
	return out
}

// endsHere says whether a closing brace ends a function, rather than a type or
// an initializer that a name or semicolon follows.
func endsHere(ts []token, i int) bool {
	if i+1 >= len(ts) {
		return true
	}
	next := ts[i+1]
	return next.text != ";" && next.text != "," && next.text != "=" && next.text != ")" && next.line > ts[i].line
}

func callOnly(ts []token) bool {
	return len(ts) > 2 && identifier(ts[0].text) && ts[1].text == "("
}

func directive(ts []token) item {
	it := item{first: ts[0].line, last: ts[len(ts)-1].line, kind: condition}
	if len(ts) > 1 {
		it.directive = ts[1].text
	}
	if it.directive == "include" { // it brings in names, it changes none
		it.kind = blank
	}
	if len(ts) > 2 && ts[1].text == "define" {
		it.kind, it.names = other, []string{ts[2].text}
		it.uses = identifiers(ts[3:])
	}
	return it
}

// Identifiers lists the identifiers in C text, sorted, without those in
// comments and strings.
func Identifiers(text string) []string { return identifiers(tokens(text)) }

func identifiers(ts []token) []string {
	var out []string
	for _, t := range ts {
		if identifier(t.text) {
			out = append(out, t.text)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// generators are macros that make code by names that their arguments only are
// a part of.
var generators = []string{"TRACE_EVENT", "DECLARE_EVENT_CLASS", "DEFINE_EVENT", "DEFINE_EVENT_PRINT", "TRACE_EVENT_CONDITION",
	"TRACE_EVENT_FN", "TRACE_EVENT_FN_COND", "DECLARE_TRACE", "SYSCALL_DEFINE"}

// attributes look like the name of a function in a declaration.
var attributes = []string{"__attribute__", "__aligned", "__printf", "__scanf", "__section", "__acquires", "__releases", "__must_hold",
	"__alloc_size", "__counted_by", "__diagnose_as", "__assume_aligned", "__cond_acquires", "typeof", "__typeof__", "sizeof",
	"if", "for", "while", "switch", "return", "do", "else", "defined", "__bpf_kfunc", "__malloc", "__cacheline_group_begin", "asm", "__asm__", "static_assert", "_Static_assert"}

func declaration(ts []token) item {
	it := item{first: ts[0].line, last: ts[len(ts)-1].line, uses: identifiers(ts)}
	if slices.ContainsFunc(generators, func(g string) bool { return strings.HasPrefix(ts[0].text, g) }) {
		it.kind = generates
		return it
	}
	depth, body, enum, initializer := 0, -1, false, false
	for i, t := range ts {
		switch t.text {
		case "{", "(", "[":
			if depth == 0 && t.text == "{" && body < 0 {
				body, it.body = i, t.line
			}
			depth++
		case "}", ")", "]":
			depth = max(0, depth-1)
		case "enum":
			enum = enum || depth == 0
		case "=":
			initializer = initializer || depth == 0
		default:
			next := ""
			if i+1 < len(ts) {
				next = ts[i+1].text
			}
			switch {
			case !identifier(t.text), next == "(" && slices.Contains(attributes, t.text):
			case i == 0 && next == "(": // a macro that makes something of its arguments
				if end := closing(ts); end > 1 && !capital(t.text) {
					it.names = append(it.names, identifiers(ts[2:end])...)
				}
			case depth == 0 && slices.Contains([]string{"(", ";", ",", "=", "[", "{", ":"}, next):
				it.names = append(it.names, t.text) // a function, variable, type, or macro that makes one
				if next == "(" && it.function == "" {
					it.function = t.text
				}
			case depth > 0 && enum && body >= 0, depth == 1 && body < 0 && upper(ts, i):
				it.names = append(it.names, t.text) // enumerators; DEFINE_MUTEX(name)
			}
		}
	}
	if body > 0 && !enum && !initializer && !calls(ts[:body]) {
		it.kind = layout
	}
	slices.Sort(it.names)
	it.names = slices.Compact(it.names)
	return it
}

// calls says whether there are parentheses before the body: then it is a
// function's.
func calls(ts []token) bool {
	return slices.ContainsFunc(ts, func(t token) bool { return t.text == "(" }) &&
		!slices.ContainsFunc(ts, func(t token) bool { return t.text == "struct" || t.text == "union" }) ||
		len(ts) > 0 && ts[len(ts)-1].text == ")"
}

// closing is the index of the parenthesis that closes the first one.
func closing(ts []token) int {
	depth := 0
	for i, t := range ts {
		switch t.text {
		case "(":
			depth++
		case ")":
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return -1
}

func capital(s string) bool { return s == strings.ToUpper(s) }

// upper says whether an argument is one of a macro called in capitals.
func upper(ts []token, i int) bool {
	depth := 0
	for j := i - 1; j >= 0; j-- {
		switch ts[j].text {
		case ")":
			depth++
		case "(":
			if depth == 0 {
				return j > 0 && ts[j-1].text == strings.ToUpper(ts[j-1].text) && identifier(ts[j-1].text)
			}
			depth--
		}
	}
	return false
}
