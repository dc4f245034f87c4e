// SPDX-License-Identifier: Apache-2.0

package queue

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
)

const goodDiff = `--- a/net/unix/af_unix.c
+++ b/net/unix/af_unix.c
@@ -1,2 +1,3 @@
 one
+two
 three
`

func TestQueueKeepsItsOrderAndWhatWasAdded(t *testing.T) {
	q := Open(t.TempDir(), "debian-6.1")
	if ps, err := q.List(); err != nil || len(ps) != 0 {
		t.Fatalf("a queue that does not exist: %v, %v", ps, err)
	}
	for _, n := range []string{"CVE-2026-0002", "CVE-2026-0001"} {
		if err := q.Add(Patch{Name: n, Fixes: []cve.ID{cve.ID(n)}, Origin: "a\nb", Diff: []byte(goodDiff)}); err != nil {
			t.Fatal(err)
		}
	}
	ps, err := q.List()
	if err != nil || len(ps) != 2 || ps[0].Name != "CVE-2026-0002" || ps[1].Name != "CVE-2026-0001" {
		t.Fatalf("order: %v, %v", ps, err)
	}
	if string(ps[0].Diff) != goodDiff || ps[0].Origin != "a b" || !slices.Equal(ps[0].Files, []string{"net/unix/af_unix.c"}) {
		t.Errorf("read back %+v", ps[0])
	}
	if err := q.Add(Patch{Name: "CVE-2026-0001", Fixes: ps[1].Fixes, Diff: []byte(goodDiff)}); fault.CodeOf(err) != "patch_exists" {
		t.Errorf("the same name again: %v", err)
	}
	if err := q.Drop("CVE-2026-0002"); err != nil {
		t.Fatal(err)
	}
	if ps, err := q.List(); err != nil || len(ps) != 1 || ps[0].Name != "CVE-2026-0001" {
		t.Errorf("after the drop: %v, %v", ps, err)
	}
	if err := q.Drop("CVE-2026-0002"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("dropped twice: %v", err)
	}
}

func TestForeignDiffsAreRefused(t *testing.T) {
	many := strings.Builder{}
	for i := range maxFiles + 1 {
		fmt.Fprintf(&many, "--- a/f%d.c\n+++ b/f%d.c\n@@ -1 +1 @@\n-a\n+b\n", i, i)
	}
	for _, c := range []struct {
		name, diff string
		code       fault.Code
	}{
		{"escapes the tree", "--- a/../../etc/passwd\n+++ b/../../etc/passwd\n@@ -1 +1 @@\n-a\n+b\n", "patch_path"},
		{"absolute path", "--- /etc/passwd\n+++ /etc/passwd\n@@ -1 +1 @@\n-a\n+b\n", "patch_path"},
		{"escapes in the middle", "--- a/net/../../x.c\n+++ b/net/../../x.c\n@@ -1 +1 @@\n-a\n+b\n", "patch_path"},
		{"names two files", "--- a/net/x.c\n+++ b/net/y.c\n@@ -1 +1 @@\n-a\n+b\n", "patch_path"},
		{"adds a file", "--- /dev/null\n+++ b/net/x.c\n@@ -0,0 +1 @@\n+b\n", "patch_new_file"},
		{"removes a file", "--- a/net/x.c\n+++ /dev/null\n@@ -1 +0,0 @@\n-b\n", "patch_new_file"},
		{"git binary patch", "diff --git a/x b/x\nGIT binary patch\nliteral 3\n", "patch_binary"},
		{"NUL bytes", "--- a/x.c\n+++ b/x.c\n@@ -1 +1 @@\n-a\n+\x00\n", "patch_binary"},
		{"rename", "diff --git a/x b/y\nrename from x\nrename to y\n", "patch_rename"},
		{"symbolic link", "diff --git a/x b/x\nnew file mode 120000\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+/etc\n", "patch_rename"},
		{"git folder", "--- a/.git/hooks/x\n+++ b/.git/hooks/x\n@@ -1 +1 @@\n-a\n+b\n", "patch_path"},
		{"too many files", many.String(), "patch_too_large"},
		{"too long", strings.Repeat("x", maxPatch+1), "patch_too_large"},
		{"a hunk with a strange line", "--- a/x.c\n+++ b/x.c\n@@ -1,2 +1,2 @@\n-a\n+b\nx\n", "patch_hunk"},
		{"a hunk whose last line is strange", "--- a/x.c\n+++ b/x.c\n@@ -1,2 +1 @@\n-a\n+b\nx\n", "patch_hunk"},
		{"a hunk with one line too many taken away", "--- a/x.c\n+++ b/x.c\n@@ -1 +1,2 @@\n-a\n-b\n+c\n", "patch_hunk"},
		{"a hunk that ends early", "--- a/x.c\n+++ b/x.c\n@@ -1,9 +1,9 @@\n-a\n+b\n", "patch_hunk"},
		{"a hunk of no file", "@@ -1 +1 @@\n-a\n+b\n--- a/x.c\n+++ b/x.c\n@@ -1 +1 @@\n-a\n+b\n", "patch_hunk"},
		{"a head that is none", "--- a/x.c\n+++ b/x.c\n@@ -1,99999999 +1 @@\n-a\n+b\n", "patch_hunk"},
		{"no diff at all", "hello\n", "patch_empty"},
		{"head without a hunk", "--- a/x.c\n+++ b/x.c\n", "patch_empty"},
	} {
		t.Run(c.name, func(t *testing.T) {
			files, err := Lint([]byte(c.diff))
			if err == nil {
				t.Fatalf("accepted, files %v", files)
			}
			if fault.KindOf(err) != fault.Invalid || fault.CodeOf(err) != c.code {
				t.Errorf("code %q, want %q: %v", fault.CodeOf(err), c.code, err)
			}
			q := Open(t.TempDir(), "s")
			if err := q.Add(Patch{Name: "x", Fixes: []cve.ID{"CVE-2026-0001"}, Diff: []byte(c.diff)}); err == nil {
				t.Error("the queue took it")
			}
			if _, err := os.Stat(filepath.Join(q.dir, "x.patch")); err == nil {
				t.Error("the queue kept a file of it")
			}
		})
	}
}

// What patch(1) is given holds nothing that it could read otherwise than Lint:
// it takes context diffs, ed scripts and indented diffs too, also amid mail.
func TestOnlyWhatWasReadReachesPatch(t *testing.T) {
	for name, hidden := range map[string]string{
		"a context diff":        "*** a/Makefile\n--- b/Makefile\n***************\n*** 1 ****\n! a\n--- 1 ----\n! b\n",
		"an indented diff":      "  --- a/Makefile\n  +++ b/Makefile\n  @@ -1 +1 @@\n  -a\n  +b\n",
		"a diff with an index":  "Index: b/Makefile\n@@ -1 +1 @@\n-a\n+b\n",
		"an ed script":          "Index: b/Makefile\n1c\nb\n.\n",
		"a hunk longer than it": "@@ -9 +9 @@\n-a\n+b\n--- a/Makefile\t\n +++ b/Makefile\n@@ -1 +1 @@\n-a\n+b\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for f, content := range map[string]string{"Makefile": "a\n", "x.c": "one\nthree\n3\n4\n5\n6\n7\n8\na\n"} {
				if err := os.WriteFile(filepath.Join(dir, f), []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			good := strings.ReplaceAll(goodDiff, "net/unix/af_unix.c", "x.c")
			for _, diff := range []string{hidden + good, good + hidden} {
				p := Patch{Name: "p", Fixes: []cve.ID{"CVE-2026-0001"}, Diff: []byte(diff)}
				q := Open(t.TempDir(), "s")
				if err := q.Add(p); err != nil {
					continue // refused: as good
				}
				ps, err := q.List()
				if err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command("patch", "-p1", "--batch", "--forward", "--dry-run", "-d", dir)
				cmd.Stdin = bytes.NewReader(ps[0].Diff)
				out, _ := cmd.CombinedOutput()
				if strings.Contains(string(out), "Makefile") {
					t.Errorf("files %v, but patch says: %s", ps[0].Files, out)
				}
				if !strings.Contains(string(out), "x.c") {
					t.Errorf("the good part is lost: %s", out)
				}
			}
		})
	}
}

func TestImportTakesOnlyTheNamedFunctions(t *testing.T) {
	dir := t.TempDir()
	write := func(tree, content string) string {
		p := filepath.Join(dir, tree, "net")
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p, "x.c"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, tree)
	}
	pad := strings.Repeat("\t/* pad */\n", 12)
	source := func(a, b string) string {
		return "static int first_function_with_a_name_longer_than_diff_prints(int arg)\n{\n" + pad + a + pad + "}\n\n" +
			"int second(void)\n{\n" + pad + b + pad + "}\n"
	}
	old, newer := write("old", source("\told1();\n", "\told2();\n")), write("new", source("\tnew1();\n", "\tnew2();\n"))
	both, err := Change(t.Context(), old, newer, []string{"net/x.c"}, nil)
	if err != nil || !strings.Contains(string(both), "+\tnew1();") || !strings.Contains(string(both), "+\tnew2();") {
		t.Fatalf("whole change: %v\n%s", err, both)
	}
	for fn, want := range map[string]string{"first_function_with_a_name_longer_than_diff_prints": "new1", "second": "new2"} {
		d, err := Change(t.Context(), old, newer, []string{"net/x.c"}, []string{fn})
		if err != nil || strings.Count(string(d), "\n+\t") != 1 || !strings.Contains(string(d), "+\t"+want) {
			t.Errorf("only %s: %v\n%s", fn, err, d)
		}
		if files, err := Lint(d); err != nil || len(files) != 1 {
			t.Errorf("what was imported is no good diff: %v", err)
		}
	}
	if _, err := Change(t.Context(), old, newer, []string{"net/x.c"}, []string{"third"}); fault.CodeOf(err) != "no_change" {
		t.Errorf("a function that does not change: %v", err)
	}
	if _, err := Change(t.Context(), old, old, []string{"net/x.c"}, nil); fault.CodeOf(err) != "no_change" {
		t.Errorf("nothing changes: %v", err)
	}
	if _, err := Change(t.Context(), old, newer, []string{"../x.c"}, nil); fault.CodeOf(err) != "patch_path" {
		t.Errorf("a path outside: %v", err)
	}
}

func FuzzLint(f *testing.F) {
	f.Add([]byte(goodDiff))
	f.Add([]byte("--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		files, err := Lint(b)
		if err != nil {
			return
		}
		for _, p := range files {
			if p == "" || p[0] == '/' || slices.Contains(strings.Split(p, "/"), "..") {
				t.Errorf("path %q leaves the tree", p)
			}
		}
	})
}

func TestEdits(t *testing.T) {
	diff := "--- a/x.c\n+++ b/x.c\n@@ -1,3 +1,3 @@\n one\n-two\n+zwei\n three\n@@ -10,2 +10,3 @@\n ten\n+more\n+lines\n eleven\n" +
		"--- a/y.h\n+++ b/y.h\n@@ -5,0 +6 @@\n+--- not a head\n"
	got := Edits([]byte(diff))
	want := map[string]Edit{
		"x.c": {[]int{2}, []Insertion{{3, []string{"zwei"}}, {11, []string{"more", "lines"}}}},
		"y.h": {nil, []Insertion{{6, []string{"--- not a head"}}}},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("edits %v, want %v", got, want)
	}
}
