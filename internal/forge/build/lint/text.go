// SPDX-License-Identifier: Apache-2.0

package lint

import (
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build/review"
	"klatch/internal/forge/queue"
)

// attributes of a function that no livepatch can replace
// (include/linux/init.h, include/linux/compiler_types.h, include/linux/sched/debug.h).
var attributes = []struct {
	word *regexp.Regexp
	code fault.Code
	why  string
}{
	{regexp.MustCompile(`\b__(?:mem|net_)?(?:init|exit)\b`), "init_code", "its section attribute"},
	{regexp.MustCompile(`\b(?:notrace|noinstr|noinstr_\w+)\b`), "not_traceable", "its attribute"},
	{regexp.MustCompile(`\b__sched\b`), "not_patchable", "its section attribute"},
}

// text looks at what the changed lines of a file lie in.
func (r *run) text(patch, file string, lines []string, e queue.Edit) {
	if lines == nil {
		return
	}
	untraced := path.Ext(file) == ".c" && r.untraced(file)
	for _, c := range review.Changes(lines, e) {
		if c.Blank() {
			continue
		}
		head := c.Head(lines)
		for _, a := range attributes {
			if m := a.word.FindString(head); m != "" && m != "__net_init" && m != "__net_exit" { // empty with CONFIG_NET_NS
				r.find(Finding{Certainty: Sure, Code: a.code, Patch: patch, File: file, Function: c.Name, Detail: a.why + " is " + m})
			}
		}
		if untraced && !strings.Contains(head, "inline") {
			r.find(Finding{Certainty: Sure, Code: "not_traceable", Patch: patch, File: file, Function: c.Name, Detail: "the makefile of its folder compiles it without tracing"})
		}
	}
	for _, l := range e.Removed {
		if l <= len(lines) && strings.TrimSpace(lines[l-1]) != "" {
			r.outside(patch, file, lines, l, lines[l-1])
		}
	}
	for _, n := range e.Inserted {
		if text := strings.Join(n.Lines, "\n"); strings.ContainsAny(text, ";,") {
			r.outside(patch, file, lines, n.Before, text)
		}
	}
}

var (
	typeHead = regexp.MustCompile(`^(?:typedef )?((?:struct|union)(?: \w+)?)(?: __\w+)? \{`)
	dataHead = regexp.MustCompile(`^(?:[A-Za-z_][\w \t*]*?[ \t*])(\w+)(?:\[[^\]]*\])*(?: __\w+(?:\([^)]*\))?)* = *\{?`)
	pointer  = regexp.MustCompile(`\.\w+\s*=\s*&?[a-z_]\w*\s*,`)
)

// outside looks at a change at a line that lies in a type or in a variable.
func (r *run) outside(patch, file string, lines []string, line int, text string) {
	for i := min(line-1, len(lines)-1); i >= 0; i-- {
		l := lines[i]
		if m := typeHead.FindStringSubmatch(l); m != nil && i != line-1 {
			r.find(Finding{Certainty: Probable, Code: "layout_changed", Patch: patch, File: file, Type: m[1],
				Detail: "a line among its members changes; whether their offsets do, only a build can say"})
			return
		}
		if i == line-1 && i > 0 && strings.HasPrefix(l, "}") {
			continue // before the end of what it lies in
		}
		if m := dataHead.FindStringSubmatch(l); m != nil && !strings.Contains(l, "(") && (i == line-1 || strings.HasSuffix(l, "{")) {
			f := Finding{Certainty: Probable, Code: "data_changed", Patch: patch, File: file, Function: m[1], Detail: "its initial value changes"}
			if pointer.MatchString(text) {
				f.Code, f.Detail = "ops_table_changed", "an entry of the table changes"
			}
			r.find(f)
			return
		}
		if l != "" && i != line-1 && strings.ContainsRune("}{", rune(l[0])) || strings.HasPrefix(l, "}") {
			return
		}
	}
}

// untraced says whether the makefiles compile a file without tracing: for the
// whole folder, or for this object (lib/Makefile; Documentation/kbuild/makefiles.rst,
// "ccflags-remove-y", "CFLAGS_REMOVE_$@").
func (r *run) untraced(file string) bool {
	b, err := durable.ReadFile(filepath.Join(r.tree.Source(), path.Dir(file), "Makefile"), maxSource)
	if err != nil {
		return false
	}
	object := strings.TrimSuffix(path.Base(file), ".c") + ".o"
	for l := range strings.Lines(string(b)) {
		if !strings.Contains(l, "CC_FLAGS_FTRACE") || strings.HasPrefix(l, "#") {
			continue
		}
		if strings.HasPrefix(l, "CFLAGS_REMOVE_"+object+" ") || strings.HasPrefix(l, "ccflags-remove-") ||
			strings.HasPrefix(l, "KBUILD_CFLAGS = $(subst") {
			return true
		}
	}
	return false
}

var (
	exporter  = regexp.MustCompile(`(?m)^\s*EXPORT_SYMBOL(?:_GPL|_NS|_NS_GPL)?\((\w+)`)
	parameter = regexp.MustCompile(`\s*\b\w+$`)
)

// exports compares what a file exports before and after a patch, by text.
func (r *run) exports(patch, file string, before, after []string) {
	was, is := exported(before), exported(after)
	for name, p := range was {
		f := Finding{Certainty: Sure, Code: "export_changed", Patch: patch, File: file, Function: name}
		now, stays := is[name]
		switch {
		case !stays:
			f.Detail = "it is not exported any more"
		case p != "" && now != "" && p != now:
			f.Detail = "before: " + p + "; after: " + now
		default:
			continue
		}
		r.find(f)
	}
}

// exported lists the exported symbols of a file with their prototypes, without
// the names of parameters and without const.
func exported(lines []string) map[string]string {
	out := map[string]string{}
	for _, m := range exporter.FindAllStringSubmatch(strings.Join(lines, "\n"), -1) {
		out[m[1]] = prototype(lines, m[1])
	}
	return out
}

func prototype(lines []string, name string) string {
	start := regexp.MustCompile(`^[A-Za-z_].*?\b` + name + `\(|^` + name + `\(`)
	for i, l := range lines {
		if !start.MatchString(l) || strings.HasPrefix(l, "EXPORT_") {
			continue
		}
		last := i + 1
		for last < len(lines) && !strings.HasPrefix(lines[last], "{") && !strings.Contains(lines[last-1], ";") {
			last++
		}
		text := review.Above(lines, i) + strings.Join(lines[i:last], " ")
		if strings.Contains(text, ";") {
			continue // a declaration
		}
		head, rest, _ := strings.Cut(text, "(")
		var params []string
		for p := range strings.SplitSeq(strings.TrimSuffix(strings.TrimSpace(rest), ")"), ",") {
			p = words(p)
			if strings.ContainsAny(p, " *") && !strings.Contains(p, "(") && p != "unsigned int" && p != "unsigned long" {
				p = parameter.ReplaceAllString(p, "")
			}
			params = append(params, words(p))
		}
		return words(head) + "(" + strings.Join(params, ", ") + ")"
	}
	return ""
}

// words puts one space between words and drops what changes no call.
func words(s string) string {
	var out []string
	for w := range strings.FieldsSeq(strings.ReplaceAll(s, "*", " * ")) {
		if !slices.Contains([]string{"const", "extern", "noinline", "__sched", "notrace", "asmlinkage"}, w) {
			out = append(out, w)
		}
	}
	return strings.Join(out, " ")
}
