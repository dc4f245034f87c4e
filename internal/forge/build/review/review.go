// SPDX-License-Identifier: Apache-2.0

// Package review reads source patches as a reviewer would, before anything is
// compiled: which functions they change, and what in them deserves a second
// look. It refuses nothing and can be wrong; it says where to look.
package review

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/queue"
)

// Finding is one thing to look at; its code is in the catalog of refusals.
type Finding struct {
	Code     fault.Code
	File     string
	Function string
	Detail   string
}

const maxSource = 8 << 20 // bytes

var (
	locks = regexp.MustCompile(`\b(?:raw_)?(?:spin|read|write|mutex|rtnl|rcu_read|down|up|lock_sock|release_sock|seqlock|local_bh|preempt|cgroup|console|inode)_?(?:\w*_)?(?:un)?(?:lock|trylock|disable|enable|read|write)\w*\s*\(|\b(?:down|up)\s*\(`)
	waits = regexp.MustCompile(`\b(?:wait_event\w*|wait_for_completion\w*|schedule(?:_timeout\w*)?|msleep\w*|usleep_range|synchronize_\w*rcu\w*|synchronize_net|mutex_lock\w*|down|down_read|down_write|cond_resched|flush_work\w*|cancel_\w*work_sync)\s*\(|\bGFP_KERNEL\b`)
	// sleepers are calls in which tasks stay for long.
	sleepers = regexp.MustCompile(`\b(?:wait_event\w*|wait_for_completion\w*|schedule(?:_timeout\w*)?|msleep\w*|kthread_should_stop|sk_wait_data|sk_stream_wait_\w+|poll_schedule_timeout)\s*\(`)
	returns  = regexp.MustCompile(`^\s*return\b\s*([^;]*);`)
	// function is a line at the left margin that begins one, as diff -p shows it.
	function = regexp.MustCompile(`^[A-Za-z_][^;=]*?\b([A-Za-z_][A-Za-z0-9_]*)\(`)
)

// Look reads the patches against the unpatched tree. A file that cannot be
// read, because a build makes it, has no findings about its functions.
func Look(tree string, patches []queue.Patch) []Finding {
	var out []Finding
	by := map[string]string{} // function of a file, to the patch that changes it
	for _, p := range patches {
		edits := queue.Edits(p.Diff)
		for _, f := range p.Files {
			b, err := durable.ReadFile(filepath.Join(tree, f), maxSource)
			if err != nil {
				continue
			}
			lines := strings.Split(string(b), "\n")
			for _, c := range Changes(lines, edits[f]) {
				id := f + " " + c.Name
				if first, ok := by[id]; ok && first != p.Name {
					out = append(out, Finding{"merged", f, c.Name, first + " and " + p.Name})
				}
				by[id] = p.Name
				out = append(out, c.look(f)...)
			}
		}
	}
	return out
}

// Change is what a patch does in one function.
type Change struct {
	Name           string
	Removed, Added []string
	first          int      // index of the function's first line
	body           []string // old
}

// Blank says whether only comments and empty lines change.
func (c Change) Blank() bool {
	return !slices.ContainsFunc(slices.Concat(c.Removed, c.Added), func(l string) bool {
		l = strings.TrimSpace(l)
		return l != "" && !strings.HasPrefix(l, "/*") && !strings.HasPrefix(l, "*") && !strings.HasPrefix(l, "//")
	})
}

// Head is all that stands before the function's body, on one line; lines are
// those that Changes was given.
func (c Change) Head(lines []string) string {
	last := c.first + 1
	for last < len(lines) && !strings.HasPrefix(lines[last], "{") {
		last++
	}
	return Above(lines, c.first) + strings.Join(lines[c.first:last], " ")
}

// Above is the part of a function's head on the line above its name, where
// there is one: its type, or an attribute.
func Above(lines []string, i int) string {
	if i == 0 {
		return ""
	}
	l := lines[i-1]
	if l == "" || !letter(l[0]) || strings.ContainsAny(l, ";{}()#:") {
		return ""
	}
	return l + " "
}

func letter(c byte) bool { return c == '_' || c|0x20 >= 'a' && c|0x20 <= 'z' }

// Changes groups an edit by the function that it is in; what is in none is
// left out.
func Changes(lines []string, e queue.Edit) []Change {
	var out []Change
	at := func(line int) *Change {
		name, start := functionAt(lines, line)
		if name == "" {
			return nil
		}
		i := slices.IndexFunc(out, func(c Change) bool { return c.Name == name })
		if i < 0 {
			end := start
			for end < len(lines) && !strings.HasPrefix(lines[end], "}") {
				end++
			}
			out = append(out, Change{Name: name, first: start, body: lines[start:end]})
			i = len(out) - 1
		}
		return &out[i]
	}
	for _, l := range e.Removed {
		if c := at(l); c != nil && l <= len(lines) {
			c.Removed = append(c.Removed, lines[l-1])
		}
	}
	for _, n := range e.Inserted {
		if c := at(n.Before); c != nil {
			c.Added = append(c.Added, n.Lines...)
		}
	}
	return out
}

// functionAt names the function that a line, from 1, lies in, and the index of
// its first line.
func functionAt(lines []string, line int) (string, int) {
	for i := min(line-1, len(lines)-1); i >= 0; i-- {
		if strings.HasPrefix(lines[i], "}") && i != line-1 {
			return "", 0
		}
		if m := function.FindStringSubmatch(lines[i]); m != nil {
			if strings.HasSuffix(lines[i], ";") { // a declaration, or EXPORT_SYMBOL
				return "", 0
			}
			return m[1], i
		}
	}
	return "", 0
}

func (c Change) look(file string) []Finding {
	var out []Finding
	add := func(code fault.Code, format string, args ...any) {
		out = append(out, Finding{code, file, c.Name, fmt.Sprintf(format, args...)})
	}
	if was, is := calls(locks, c.Removed), calls(locks, c.Added); !slices.Equal(was, is) {
		add("lock_changed", "before %s; after %s", list(was), list(is))
	}
	if was, is := calls(waits, c.Removed), calls(waits, c.Added); len(is) > len(was) {
		add("new_wait", "%s", list(is))
	}
	if was, is := values(c.Removed), values(c.Added); len(was) > 0 && len(is) > 0 && !slices.Equal(was, is) {
		add("return_changed", "before %s; after %s", list(was), list(is))
	}
	if s := calls(sleepers, c.body); len(s) > 0 {
		add("sleeps", "%s", list(s))
	}
	return out
}

func list(s []string) string {
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

// calls lists what a pattern finds, sorted, without the parenthesis.
func calls(re *regexp.Regexp, lines []string) []string {
	var out []string
	for _, l := range lines {
		for _, m := range re.FindAllString(l, -1) {
			out = append(out, strings.TrimRight(m, " \t("))
		}
	}
	slices.Sort(out)
	return out
}

func values(lines []string) []string {
	var out []string
	for _, l := range lines {
		if m := returns.FindStringSubmatch(l); m != nil {
			out = append(out, strings.TrimSpace(m[1]))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
