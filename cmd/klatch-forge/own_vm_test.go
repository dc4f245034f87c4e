// SPDX-License-Identifier: Apache-2.0

//go:build vm

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"klatch/internal/forge/catalog"
	"klatch/internal/testkit/kerneltest"
)

// TestOwnKernelFromTheCommandLine: kernel add --tree, queue add, build, as the
// how-to tells it.
func TestOwnKernelFromTheCommandLine(t *testing.T) {
	k := kerneltest.Own(t)
	data := filepath.Join(t.TempDir(), "data")
	run := func(args ...string) string {
		t.Helper()
		out, err := forge(append([]string{"--quiet", "--dir", data, "--cache", k.Cache}, args...)...)
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return out
	}
	if out, err := forge("init", data, "--profile", "lab"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p := k.Parts
	out := run("kernel", "add", "--tree", p.Source, "--config", p.Config, "--vmlinux", p.Vmlinux, "--image", p.Image, "--modules", p.Modules, "--json")
	var added struct{ Release, Distro, BuildID, Series string }
	if err := json.Unmarshal([]byte(strings.ReplaceAll(out, "build_id", "BuildID")), &added); err != nil {
		t.Fatal(err)
	}
	if added.Release != string(k.Entry.Release) || added.Distro != "own" || added.BuildID != k.Entry.BuildID.String() || !strings.HasPrefix(added.Series, "own-") {
		t.Errorf("added %+v", added)
	}
	e, err := catalog.Load(data, k.Entry.Release)
	if err != nil || e.Builder != "klpbuild" || e.Packages["tree"] == "" {
		t.Fatalf("entry %+v, %v", e, err)
	}
	source, err := os.ReadFile(filepath.Join(k.Tree.Source(), "fs/proc/cmdline.c"))
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Count(strings.Split(string(source), "seq_putc(m, '\\n');")[0], "\n") + 1
	lines := strings.Split(string(source), "\n")
	patch := filepath.Join(t.TempDir(), "fix.patch")
	diff := "--- a/fs/proc/cmdline.c\n+++ b/fs/proc/cmdline.c\n@@ -" + strconv.Itoa(line) + ",2 +" + strconv.Itoa(line) + ",3 @@\n " + lines[line-1] + "\n+\tseq_puts(m, \"fixed\\n\");\n " + lines[line] + "\n"
	if err := os.WriteFile(patch, []byte(diff), 0o644); err != nil {
		t.Fatal(err)
	}
	run("queue", "add", patch, "--series", added.Series, "--fixes", "CVE-2000-0001")
	if out := run("build", "--kernel", added.Release); !strings.Contains(out, "klatch_1.ko sequence 1") || !strings.Contains(out, "cmdline_proc_show in fs/proc/cmdline.c") {
		t.Errorf("build says\n%s", out)
	}
	if out, err := forge("--dir", data, "--cache", k.Cache, "queue", "import", "--kernel", added.Release, "--to", "1", "--file", "a.c", "--fixes", "CVE-2000-0002"); err == nil {
		t.Errorf("an import for an own kernel worked: %s", out)
	}
}
