// SPDX-License-Identifier: Apache-2.0

package queue

import (
	"bytes"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/fault"
)

// Lint reads a unified diff as a foreign file and returns the files that it
// touches, without their first path element. It refuses what must not reach
// patch(1): paths that leave the tree, links, binary changes, renames.
func Lint(diff []byte) ([]string, error) {
	files, _, err := read(diff)
	return files, err
}

// Plain reads a diff as Lint does and also returns it as List would: nothing
// but heads and hunks.
func Plain(diff []byte) (files []string, plain []byte, err error) { return read(diff) }

var hunkSize = regexp.MustCompile(`^@@ -[0-9]+(?:,([0-9]{1,7}))? \+[0-9]+(?:,([0-9]{1,7}))? @@`)

// read also returns the diff without anything around its hunks: patch(1) would
// find context diffs, indented ones and ed scripts there, which nobody read.
func read(diff []byte) (files []string, plain []byte, err error) {
	bad := func(code fault.Code, format string, args ...any) error {
		return fault.New(fault.Invalid, code, format, args...)
	}
	if len(diff) > maxPatch {
		return nil, nil, bad("patch_too_large", "diff has %d bytes, limit %d", len(diff), maxPatch)
	}
	if bytes.IndexByte(diff, 0) >= 0 {
		return nil, nil, bad("patch_binary", "diff holds binary bytes")
	}
	var old string
	var out bytes.Buffer
	hunks, oldLeft, newLeft := false, 0, 0
	for raw := range strings.Lines(string(diff)) {
		line := strings.TrimRight(raw, "\r\n")
		if oldLeft > 0 || newLeft > 0 || hunks && strings.HasPrefix(line, "\\ ") {
			switch first := (line + " ")[0]; first { // an editor may have cut the space of an empty line
			case ' ':
				oldLeft, newLeft = oldLeft-1, newLeft-1
			case '-':
				oldLeft--
			case '+':
				newLeft--
			case '\\':
			default:
				oldLeft = -1
			}
			if oldLeft < 0 || newLeft < 0 {
				return nil, nil, bad("patch_hunk", "hunk is not as long as it says: %.100q", line)
			}
			out.WriteString(strings.TrimSuffix(raw, "\n") + "\n")
			continue
		}
		switch {
		case strings.HasPrefix(line, "GIT binary patch"), strings.HasPrefix(line, "Binary files "):
			return nil, nil, bad("patch_binary", "diff changes a binary file")
		case strings.HasPrefix(line, "rename "), strings.HasPrefix(line, "copy "),
			strings.HasPrefix(line, "new file mode 12"), strings.HasPrefix(line, "old mode"), strings.HasPrefix(line, "new mode"):
			return nil, nil, bad("patch_rename", "diff renames, links or changes modes: %.100q", line)
		case strings.HasPrefix(line, "--- "):
			old = fileOf(line[4:])
		case strings.HasPrefix(line, "+++ ") && old != "":
			name := fileOf(line[4:])
			if name == "/dev/null" || old == "/dev/null" {
				return nil, nil, bad("patch_new_file", "diff adds or removes a file: %.200q", line)
			}
			rel, ok := inside(name)
			if oldRel, okOld := inside(old); !ok || !okOld || rel != oldRel {
				return nil, nil, bad("patch_path", "diff names %.200q and %.200q; want the same path below a/ and b/", old, name)
			}
			if !slices.Contains(files, rel) {
				files = append(files, rel)
			}
			fmt.Fprintf(&out, "--- a/%s\n+++ b/%s\n", rel, rel)
			old = ""
		case strings.HasPrefix(line, "@@ "):
			size := hunkSize.FindStringSubmatch(line)
			if size == nil || len(files) == 0 {
				return nil, nil, bad("patch_hunk", "hunk without size or file: %.100q", line)
			}
			hunks, oldLeft, newLeft = true, count(size[1]), count(size[2])
			out.WriteString(line + "\n")
		}
	}
	switch {
	case len(files) == 0 || !hunks:
		return nil, nil, bad("patch_empty", "no unified diff found")
	case oldLeft > 0 || newLeft > 0:
		return nil, nil, bad("patch_hunk", "the last hunk is not as long as it says")
	case len(files) > maxFiles:
		return nil, nil, bad("patch_too_large", "diff touches %d files, limit %d", len(files), maxFiles)
	}
	return files, out.Bytes(), nil
}

// count is a hunk's number of lines, 1 where it is not said.
func count(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return 1
	}
	return n
}

// fileOf takes the name out of a "---" or "+++" line: up to a tab, as GNU
// diff and git write it.
func fileOf(s string) string {
	name, _, _ := strings.Cut(s, "\t")
	return strings.TrimSpace(name)
}

// inside strips the first path element and says whether the rest stays in the
// tree.
func inside(name string) (string, bool) {
	first, rel, ok := strings.Cut(name, "/")
	if !ok || first == "" || rel == "" || path.Clean(rel) != rel || path.IsAbs(rel) || rel == ".." || strings.HasPrefix(rel, "../") ||
		strings.ContainsAny(rel, "\\\"\n\t ") || strings.HasPrefix(rel, ".git") {
		return "", false
	}
	return rel, true
}

// Edit is what a diff does to one file, by lines of the old text from 1.
type Edit struct {
	Removed  []int
	Inserted []Insertion
}

// Insertion is new text that stands before a line of the old.
type Insertion struct {
	Before int
	Lines  []string
}

var hunkStart = regexp.MustCompile(`^@@ -([0-9]{1,7})(?:,([0-9]{1,7}))? `)

// Edits lists what a diff, in the form that List gives, does to each file.
func Edits(diff []byte) map[string]Edit {
	all := map[string]Edit{}
	file, line, left := "", 0, 0
	var e Edit
	var added []string
	flush := func() {
		if len(added) > 0 {
			e.Inserted = append(e.Inserted, Insertion{line, added})
			added = nil
		}
	}
	keep := func() {
		flush()
		if file != "" {
			all[file] = e
		}
	}
	for raw := range strings.Lines(string(diff)) {
		l := strings.TrimRight(raw, "\r\n")
		m := hunkStart.FindStringSubmatch(l)
		switch {
		case m != nil:
			flush()
			line, left = count(m[1]), count(m[2])
			if left == 0 { // "-5,0": after line 5
				line++
			}
		case left <= 0 && strings.HasPrefix(l, "--- "):
		case left <= 0 && strings.HasPrefix(l, "+++ b/"):
			keep()
			file = l[6:]
			e = all[file]
		case strings.HasPrefix(l, "+"):
			added = append(added, l[1:])
		case strings.HasPrefix(l, "-"):
			flush()
			e.Removed = append(e.Removed, line)
			line, left = line+1, left-1
		case strings.HasPrefix(l, "\\"):
		default:
			flush()
			line, left = line+1, left-1
		}
	}
	keep()
	return all
}

// Rejects is the file, in the root of the source, that takes the hunks which
// do not fit.
const Rejects = "klatch.rej"

// ApplyCommand is patch(1) for a diff on standard input, in the root of the
// source: moved lines are accepted, other context is not.
func ApplyCommand() []string {
	return []string{"patch", "-p1", "--unified", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=" + Rejects}
}
