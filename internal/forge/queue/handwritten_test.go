// SPDX-License-Identifier: Apache-2.0

package queue_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/queue"
)

const goodDeclared = `fixes = ["CVE-2000-0001"]
[[function]]
object = "vmlinux"
name = "f"
file = "fs/proc/cmdline.c"
[[callback]]
object = "vmlinux"
when = ["pre_patch"]
[[shadow]]
id = 0x10
about = "x"
`

func TestHandwrittenIsReadAsForeign(t *testing.T) {
	files := func(declared, name, text string) []queue.SourceFile {
		return []queue.SourceFile{{Name: name, Content: []byte(text)}, {Name: queue.DeclaredName, Content: []byte(declared)}}
	}
	swap := func(from, to string) string {
		if !strings.Contains(goodDeclared, from) {
			t.Fatalf("no %q", from)
		}
		return strings.Replace(goodDeclared, from, to, 1)
	}
	h, err := queue.ParseHandwritten(files(goodDeclared, "a.c", "#include <linux/a.h>\n# include \"b_1.h\" /* ours */\n"))
	if err != nil || len(h.Functions) != 1 || h.Shadows[0].ID != 16 || h.Fixes[0] != "CVE-2000-0001" || len(h.Files) != 2 {
		t.Fatalf("good: %+v, %v", h, err)
	}
	for name, in := range map[string][]queue.SourceFile{
		"no code":                       files(goodDeclared, "a.h", ""),
		"no declaration":                files(goodDeclared, "a.c", "")[:1],
		"a makefile":                    files(goodDeclared, "Makefile", ""),
		"a name of ours":                files(goodDeclared, "klatch_1.c", ""),
		"our glue's name":               files(goodDeclared, "klatch-info.c", ""),
		"a path":                        files(goodDeclared, "../a.c", ""),
		"assembly":                      files(goodDeclared, "a.S", ""),
		"no text":                       files(goodDeclared, "a.c", "\xff\xfe"),
		"a binary byte":                 files(goodDeclared, "a.c", "int a;\x00"),
		"too long":                      files(goodDeclared, "a.c", strings.Repeat("x", 1<<20+1)),
		"an include by absolute path":   files(goodDeclared, "a.c", "#include \"/etc/passwd\"\n"),
		"an include by kernel escape":   files(goodDeclared, "a.c", "#include <linux/../../x.h>\n"),
		"an include from above":         files(goodDeclared, "a.c", "#include \"../x.h\"\n"),
		"an include in two lines":       files(goodDeclared, "a.c", "#incl\\\nude \"../x.h\"\n"),
		"an include of a macro":         files(goodDeclared, "a.c", "#include FILE\n"),
		"a file taken by the assembler": files(goodDeclared, "a.c", "asm(\".incbin \\\"/etc/passwd\\\"\");\n"),
		"no fixes":                      files(swap(`fixes = ["CVE-2000-0001"]`, ""), "a.c", ""),
		"a fix that is no CVE":          files(swap("CVE-2000-0001", "BUG-1"), "a.c", ""),
		"a member that is unknown":      files(swap("fixes", "more = 1\nfixes"), "a.c", ""),
		"no function":                   files(swap("[[function]]", "[[callback]]"), "a.c", ""),
		"a clone of the compiler's":     files(swap(`name = "f"`, `name = "f.isra.0"`), "a.c", ""),
		"a file outside of the tree":    files(swap("fs/proc/cmdline.c", "../x.c"), "a.c", ""),
		"a file that is no C":           files(swap("cmdline.c", "cmdline.S"), "a.c", ""),
		"a function twice":              files(swap("[[callback]]", "[[function]]\nobject = \"vmlinux\"\nname = \"f\"\nfile = \"a.c\"\n[[callback]]"), "a.c", ""),
		"a callback at no time":         files(swap("pre_patch", "sometimes"), "a.c", ""),
		"a callback of another object":  files(strings.Replace(goodDeclared, "[[callback]]\nobject = \"vmlinux\"", "[[callback]]\nobject = \"ext4\"", 1), "a.c", ""),
		"a shadow without words":        files(swap(`about = "x"`, ""), "a.c", ""),
	} {
		if h, err := queue.ParseHandwritten(in); err == nil {
			t.Errorf("%s: accepted: %+v", name, h)
		}
	}
}

func TestQueueHoldsEither(t *testing.T) {
	from, data := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{"a.c": "int a;\n", queue.DeclaredName: goodDeclared} {
		if err := os.WriteFile(filepath.Join(from, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	h, err := queue.ReadHandwritten(from)
	if err != nil {
		t.Fatal(err)
	}
	q := queue.Open(data, "debian-6.1")
	if have, err := q.Handwritten(); have != nil || err != nil {
		t.Fatalf("empty queue: %v, %v", have, err)
	}
	for range 2 { // the second takes the place of the first
		if err := q.SetHandwritten(h); err != nil {
			t.Fatal(err)
		}
	}
	have, err := q.Handwritten()
	if err != nil || have == nil || len(have.Files) != 2 || string(have.Files[0].Content) != "int a;\n" {
		t.Fatalf("%+v, %v", have, err)
	}
	left, err := os.ReadDir(filepath.Join(data, "queue", "debian-6.1"))
	if err != nil || len(left) != 2 { // checks, source
		t.Errorf("left %v, %v", left, err)
	}
	patch := queue.Patch{Name: "x", Fixes: h.Fixes, Diff: []byte("--- a/f.c\n+++ b/f.c\n@@ -1,1 +1,1 @@\n-a\n+b\n")}
	if err := q.Add(patch); fault.CodeOf(err) != "mixed_queue" {
		t.Errorf("a source patch beside it: %v", err)
	}
	if err := q.DropHandwritten(); err != nil {
		t.Fatal(err)
	}
	if err := q.Add(patch); err != nil {
		t.Fatal(err)
	}
	if err := q.SetHandwritten(h); fault.CodeOf(err) != "mixed_queue" {
		t.Errorf("beside a source patch: %v", err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(from, "b.c")); err != nil {
		t.Fatal(err)
	}
	if _, err := queue.ReadHandwritten(from); err == nil {
		t.Error("a link was followed")
	}
}
