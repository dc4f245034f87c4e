// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/headers"
)

// maxSource limits a source file, in bytes; the largest register header of
// the kernel has 6 MiB.
const maxSource = 16 << 20

// change is what differs in one file between two sources.
type change struct {
	file  string
	old   []string // lines with their ends
	hunks []hunk

	has   map[string]bool // identifiers of the old text
	parts []int           // see part
}

// hunk is one run of lines that differ.
type hunk struct {
	at      int      // first old line, from 1; for an insertion, the line that it stands before
	removed int      // old lines
	lines   []string // new lines with their ends

	fresh  []string // identifiers of the new lines that the old file does not have
	brings []string // of these, those that it defines
	heads  []string // functions whose declaration it changes
	calls  []string // what both the removed and the new lines call or declare, by name

	in       []headers.Place // functions, types and variables that it is within
	gone     []string        // identifiers of the removed lines that the new file does not have
	defines  []string        // functions that are new
	mentions []string        // identifiers of the removed and the new lines
}

var unifiedHunk = regexp.MustCompile(`^@@ -([0-9]+)(?:,([0-9]+))? \+[0-9]+(?:,[0-9]+)? @@`)

// sameContent compares two files without keeping them.
func sameContent(a, b string) (bool, error) {
	x, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer x.Close() //nolint:errcheck // opened for reading only
	y, err := os.Open(b)
	if err != nil {
		return false, err
	}
	defer y.Close() //nolint:errcheck // opened for reading only
	if sx, err := x.Stat(); err != nil {
		return false, err
	} else if sy, err := y.Stat(); err != nil || sx.Size() != sy.Size() {
		return false, err
	}
	p, q := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(x, p)
		if m, _ := io.ReadFull(y, q[:n]); m != n || !bytes.Equal(p[:n], q[:n]) {
			return false, nil
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// compareFile reads what differs in a file that differs.
func compareFile(ctx context.Context, a, b, file string) (*change, error) {
	old, err := durable.ReadFile(a, maxSource)
	if err != nil {
		return nil, err
	}
	if st, err := os.Stat(b); err != nil {
		return nil, err
	} else if st.Size() > maxSource {
		return nil, fault.New(fault.Invalid, "source_too_large", "file %s has %d bytes, limit %d", file, st.Size(), maxSource)
	}
	out, err := diff(ctx, "-U0", a, b, file)
	if err != nil {
		return nil, err
	}
	c := &change{file: file, old: strings.SplitAfter(string(old), "\n")}
	if err := c.read(out); err != nil {
		return nil, err
	}
	c.names()
	return c, nil
}

// diff runs diff(1) on two files under one name.
func diff(ctx context.Context, context, a, b, name string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, "diff", context, "-p", "-a", "--label", "a/"+name, "--label", "b/"+name, a, b).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		err = nil // status 1 is "they differ" (POSIX diff)
	}
	if err != nil {
		return nil, fmt.Errorf("compare %s: %w", name, err)
	}
	return out, nil
}

// read takes the hunks out of a unified diff without context.
func (c *change) read(out []byte) error {
	for raw := range strings.Lines(string(out)) {
		m := unifiedHunk.FindStringSubmatch(raw)
		switch {
		case m != nil:
			at, err := strconv.Atoi(m[1])
			if err != nil {
				return fault.New(fault.Internal, "bad_diff", "compare %s: %w", c.file, err)
			}
			n := 1
			if m[2] != "" {
				if n, err = strconv.Atoi(m[2]); err != nil {
					return fault.New(fault.Internal, "bad_diff", "compare %s: %w", c.file, err)
				}
			}
			if n == 0 { // "-5,0": after line 5
				at++
			}
			c.hunks = append(c.hunks, hunk{at: at, removed: n})
		case len(c.hunks) == 0 || raw == "":
		case raw[0] == '+':
			h := &c.hunks[len(c.hunks)-1]
			h.lines = append(h.lines, raw[1:])
		case raw[0] == '\\': // the last line has no end
			h := &c.hunks[len(c.hunks)-1]
			if n := len(h.lines); n > 0 {
				h.lines[n-1] = strings.TrimSuffix(h.lines[n-1], "\n")
			}
		}
	}
	if len(c.hunks) == 0 {
		return fault.New(fault.Internal, "bad_diff", "compare %s: the files differ, but diff shows nothing", c.file)
	}
	return nil
}

// commentLine finds the lines of a comment that began before.
var commentLine = regexp.MustCompile(`(?m)^[ \t]*(?:/\*|\*/|\*[ \t]|\*$).*$`)

// functionHead finds the first line of a function, at the left margin.
var functionHead = regexp.MustCompile(`(?m)^[A-Za-z_][^;={}()\n]*?\b([A-Za-z_]\w*)\([^;\n]*$`)

var callName = regexp.MustCompile(`\b([A-Za-z_][A-Za-z0-9_]*)\s*\(`)

// names reads the identifiers of each hunk.
func (c *change) names() {
	old := strings.Join(c.old, "")
	c.has = map[string]bool{}
	for _, n := range headers.Identifiers(old) {
		c.has[n] = true
	}
	is := map[string]bool{}
	for _, n := range headers.Identifiers(string(c.text(func(int) bool { return true }))) {
		is[n] = true
	}
	edits := make([]headers.Change, len(c.hunks))
	for i := range c.hunks {
		h := &c.hunks[i]
		text := strings.Join(h.lines, "")
		edit := headers.Change{File: c.file}
		for l := range h.removed {
			edit.Removed = append(edit.Removed, h.at+l)
		}
		if len(h.lines) > 0 {
			edit.Inserted = []headers.Insertion{{Before: h.at + h.removed, Lines: strings.Split(strings.TrimSuffix(text, "\n"), "\n")}}
		}
		for _, n := range headers.Identifiers(commentLine.ReplaceAllString(text, "")) {
			if !c.has[n] {
				h.fresh = append(h.fresh, n)
			}
		}
		edits[i] = edit
		h.brings = headers.Brings(old, edit)
		h.heads = headers.Signatures(old, edit)
		removed := strings.Join(c.old[min(h.at-1, len(c.old)):min(h.at-1+h.removed, len(c.old))], "")
		for _, n := range headers.Identifiers(commentLine.ReplaceAllString(removed, "")) {
			if !is[n] {
				h.gone = append(h.gone, n)
			}
		}
		h.mentions = headers.Identifiers(removed + text)
		for _, m := range functionHead.FindAllStringSubmatch(text, -1) {
			if !c.has[m[1]] {
				h.defines = append(h.defines, m[1])
			}
		}
		was := map[string]bool{}
		for _, m := range callName.FindAllStringSubmatch(removed, -1) {
			was[m[1]] = true
		}
		for _, m := range callName.FindAllStringSubmatch(text, -1) {
			if was[m[1]] && !slices.Contains(h.calls, m[1]) && !keyword[m[1]] {
				h.calls = append(h.calls, m[1])
			}
		}
	}
	for i, in := range headers.Touched(old, edits) {
		c.hunks[i].in = in
	}
}

// keyword are words before a parenthesis that are no names.
var keyword = map[string]bool{"if": true, "for": true, "while": true, "switch": true, "return": true, "sizeof": true,
	"defined": true, "__attribute__": true, "typeof": true, "likely": true, "unlikely": true}

// text is the file with some of its hunks.
func (c *change) text(with func(i int) bool) []byte {
	var b bytes.Buffer
	line := 1
	put := func(to int) {
		for ; line < to && line <= len(c.old); line++ {
			b.WriteString(c.old[line-1])
		}
	}
	for i, h := range c.hunks {
		if !with(i) {
			continue
		}
		put(h.at)
		for _, l := range h.lines {
			b.WriteString(l)
		}
		line = h.at + h.removed
	}
	put(len(c.old) + 1)
	return b.Bytes()
}

// node is one hunk of one file.
type node struct {
	file string
	hunk int
}

// nodes is a set of hunks.
type nodes map[node]bool

func (n nodes) files() []string {
	var out []string
	for k := range n {
		out = append(out, k.file)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// key names a set in one word, for maps.
func (n nodes) key() string {
	var parts []string
	for k := range n {
		parts = append(parts, k.file+":"+strconv.Itoa(k.hunk))
	}
	slices.Sort(parts)
	return strings.Join(parts, " ")
}

// diffOf makes the unified diff from one set of hunks to a larger one.
func (d *Delta) diffOf(ctx context.Context, files []string, from, to nodes) ([]byte, error) {
	tmp, err := os.MkdirTemp("", "klatch-flood-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // scratch
	a, b := filepath.Join(tmp, "a"), filepath.Join(tmp, "b")
	var out bytes.Buffer
	for _, f := range files {
		c := d.changes[f]
		for file, set := range map[string]nodes{a: from, b: to} {
			text := c.text(func(i int) bool { return set[node{f, i}] })
			if err := os.WriteFile(file, text, 0o600); err != nil { //nolint:forbidigo // scratch
				return nil, err
			}
		}
		part, err := diff(ctx, "-U3", a, b, f)
		if err != nil {
			return nil, err
		}
		out.Write(part)
	}
	return out.Bytes(), nil
}

func exists(file string) (bool, error) {
	_, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
