// SPDX-License-Identifier: Apache-2.0

package queue

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Change makes a diff of files between two source trees, limited to some
// functions where functions is not empty: then only hunks that lie in a
// function of that name are taken. A function that no hunk names is an error,
// so that a misspelled one is not an empty fix.
func Change(ctx context.Context, oldTree, newTree string, files, functions []string) ([]byte, error) {
	var out bytes.Buffer
	found := map[string]bool{}
	for _, name := range files {
		rel, ok := inside("a/" + name)
		if !ok {
			return nil, fault.New(fault.Invalid, "patch_path", "%.200q is not a path in a kernel tree", name)
		}
		for _, tree := range []string{oldTree, newTree} {
			if _, err := os.Stat(filepath.Join(tree, rel)); err != nil {
				return nil, fault.New(fault.NotFound, "no_file", "file %s: %w", rel, err)
			}
		}
		diff, err := diffFile(ctx, filepath.Join(oldTree, rel), filepath.Join(newTree, rel), rel)
		if err != nil {
			return nil, err
		}
		if len(functions) > 0 {
			old, err := durable.ReadFile(filepath.Join(oldTree, rel), maxPatch)
			if err != nil {
				return nil, err
			}
			diff = onlyFunctions(diff, strings.Split(string(old), "\n"), functions, found)
		}
		out.Write(diff)
	}
	for _, f := range functions {
		if !found[f] {
			return nil, fault.New(fault.NotFound, "no_change", "function %s does not change in %s", f, strings.Join(files, ", "))
		}
	}
	if out.Len() == 0 {
		return nil, fault.New(fault.NotFound, "no_change", "%s do not change between the two sources", strings.Join(files, ", "))
	}
	return out.Bytes(), nil
}

func diffFile(ctx context.Context, a, b, rel string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "diff", "-u", "-p", "--label", "a/"+rel, "--label", "b/"+rel, a, b)
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		err = nil // status 1 is "they differ" (POSIX diff)
	}
	if err != nil {
		return nil, fmt.Errorf("compare %s: %w", rel, err)
	}
	return out, nil
}

var (
	hunkHead = regexp.MustCompile(`^@@ -([0-9]+)`)
	// A function's first line begins at the left margin with a letter, as
	// diff -p has it too; but diff cuts the line at 40 characters.
	functionStart = regexp.MustCompile(`^[A-Za-z_][^;=]*?\b([A-Za-z_][A-Za-z0-9_]*)\(`)
)

// onlyFunctions keeps the hunks whose first changed line lies in one of the
// functions; old is the old file, in lines.
func onlyFunctions(diff []byte, old, functions []string, found map[string]bool) []byte {
	parts := strings.SplitAfter(string(diff), "\n")
	first := slices.IndexFunc(parts, func(l string) bool { return strings.HasPrefix(l, "@@ ") })
	if first < 0 {
		return nil
	}
	var kept strings.Builder
	for i := first; i < len(parts); {
		end := i + 1
		for end < len(parts) && !strings.HasPrefix(parts[end], "@@ ") {
			end++
		}
		if name := functionOf(parts[i:end], old); slices.Contains(functions, name) {
			found[name] = true
			kept.WriteString(strings.Join(parts[i:end], ""))
		}
		i = end
	}
	if kept.Len() == 0 {
		return nil
	}
	return []byte(strings.Join(parts[:first], "") + kept.String())
}

// functionOf names the function that a hunk's first changed line lies in.
func functionOf(hunk, old []string) string {
	m := hunkHead.FindStringSubmatch(hunk[0])
	if m == nil {
		return ""
	}
	line, err := strconv.Atoi(m[1])
	if err != nil {
		return ""
	}
	for _, l := range hunk[1:] {
		if !strings.HasPrefix(l, " ") {
			break
		}
		line++
	}
	for i := min(line-1, len(old)) - 1; i >= 0; i-- { // line counts from 1; the line above comes first
		if m := functionStart.FindStringSubmatch(old[i]); m != nil {
			return m[1]
		}
	}
	return ""
}
