// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/fault"
)

// TestABadDiffIsRefusedAndTheNextOneTaken: each bad diff ends with exit
// status 2 and its code, nothing of it stays, and a good one is taken after it.
func TestABadDiffIsRefusedAndTheNextOneTaken(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	if out, err := forge("init", data, "--profile", "lab"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var thousand strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&thousand, "--- a/net/f%d.c\n+++ b/net/f%d.c\n@@ -1 +1 @@\n-a\n+b\n", i, i)
	}
	huge := filepath.Join(dir, "huge.patch")
	f, err := os.Create(huge)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(100 << 20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	const head = "--- a/net/x.c\n+++ b/net/x.c\n"
	limit := head + "@@ -1 +1 @@\n-a\n+" // with its header over the limit that reading the queue has
	for _, c := range []struct {
		name, diff string
		code       fault.Code
	}{
		{"leaves the tree", "--- a/../../etc/passwd\n+++ b/../../etc/passwd\n@@ -1 +1 @@\n-a\n+b\n", "patch_path"},
		{"changes a binary file", "diff --git a/x b/x\nindex 1..2 100644\nGIT binary patch\nliteral 3\nKc$}aP00;m8\n\n", "patch_binary"},
		{"touches a thousand files", thousand.String(), "patch_too_large"},
		{"has 100 MB", "", "patch_too_large"},
		{"has the most bytes that are read", limit + strings.Repeat("x", 4<<20-len(limit)-1) + "\n", "patch_too_large"},
		{"lies about a hunk, shorter", head + "@@ -1,2 +1,2 @@\n-a\n+b\n", "patch_hunk"},
		{"lies about a hunk, longer", head + "@@ -1 +1 @@\n-a\n-b\n+c\n", "patch_hunk"},
		{"lies about a hunk to hide the next file", head + "@@ -1,1 +1,4 @@\n-a\n+b\n--- a/Makefile\n+++ b/Makefile\n@@ -1 +1 @@\n-a\n+b\n", "patch_hunk"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(dir, "bad.patch")
			if c.diff == "" {
				file = huge
			} else if err := os.WriteFile(file, []byte(c.diff), 0o644); err != nil {
				t.Fatal(err)
			}
			before := tree(t, data)
			_, err := forge("--dir", data, "queue", "add", file, "--name", "bad", "--fixes", "CVE-2026-0001")
			if fault.ExitStatus(err) != 2 || fault.CodeOf(err) != c.code {
				t.Errorf("exit status %d, code %q, want 2 and %s: %.300v", fault.ExitStatus(err), fault.CodeOf(err), c.code, err)
			}
			if after := tree(t, data); !slices.Equal(before, after) {
				t.Errorf("left behind: before %v, after %v", before, after)
			}
			good := filepath.Join(dir, "good.patch")
			if err := os.WriteFile(good, []byte(head+"@@ -1 +1 @@\n-a\n+b\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{{"add", good, "--name", "good", "--fixes", "CVE-2026-0001"}, {"list"}, {"drop", "good"}} {
				if out, err := forge(append([]string{"--dir", data, "queue"}, args...)...); err != nil {
					t.Errorf("queue %s: %v: %s", args[0], err, out)
				}
			}
			_ = os.Remove(filepath.Join(data, "queue", "debian-6.1", "good.patch"))
		})
	}
}

// tree lists the files of a queue and what the series says.
func tree(t *testing.T, data string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(data, "queue", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	series, _ := os.ReadFile(filepath.Join(data, "queue", "debian-6.1", "series"))
	files = slices.DeleteFunc(files, func(f string) bool { // made by the first good one
		return filepath.Base(f) == "checks" || filepath.Base(f) == "series"
	})
	return append(files, string(series))
}
