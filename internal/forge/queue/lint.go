// SPDX-License-Identifier: Apache-2.0

package queue

import (
	"bytes"
	"path"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// Lint reads a unified diff as a foreign file and returns the files that it
// touches, without their first path element. It refuses what must not reach
// patch(1): paths that leave the tree, links, binary changes, renames.
func Lint(diff []byte) ([]string, error) {
	bad := func(code fault.Code, format string, args ...any) error {
		return fault.New(fault.Invalid, code, format, args...)
	}
	if len(diff) > maxPatch {
		return nil, bad("patch_too_large", "diff has %d bytes, limit %d", len(diff), maxPatch)
	}
	if bytes.IndexByte(diff, 0) >= 0 {
		return nil, bad("patch_binary", "diff holds binary bytes")
	}
	var files []string
	var old string
	hunks := false
	for line := range strings.Lines(string(diff)) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "GIT binary patch"), strings.HasPrefix(line, "Binary files "):
			return nil, bad("patch_binary", "diff changes a binary file")
		case strings.HasPrefix(line, "rename "), strings.HasPrefix(line, "copy "),
			strings.HasPrefix(line, "new file mode 12"), strings.HasPrefix(line, "old mode"), strings.HasPrefix(line, "new mode"):
			return nil, bad("patch_rename", "diff renames, links or changes modes: %.100q", line)
		case strings.HasPrefix(line, "--- "):
			old = fileOf(line[4:])
		case strings.HasPrefix(line, "+++ ") && old != "":
			name := fileOf(line[4:])
			if name == "/dev/null" || old == "/dev/null" {
				return nil, bad("patch_new_file", "diff adds or removes a file: %.200q", line)
			}
			rel, ok := inside(name)
			if oldRel, okOld := inside(old); !ok || !okOld || rel != oldRel {
				return nil, bad("patch_path", "diff names %.200q and %.200q; want the same path below a/ and b/", old, name)
			}
			if !slices.Contains(files, rel) {
				files = append(files, rel)
			}
			old = ""
		case strings.HasPrefix(line, "@@ "):
			hunks = true
		}
	}
	switch {
	case len(files) == 0 || !hunks:
		return nil, bad("patch_empty", "no unified diff found")
	case len(files) > maxFiles:
		return nil, bad("patch_too_large", "diff touches %d files, limit %d", len(files), maxFiles)
	}
	return files, nil
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
