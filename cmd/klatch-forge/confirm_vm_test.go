// SPDX-License-Identifier: Apache-2.0

//go:build vm

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// TestASecondBuilderConfirms: a real livepatch of profile full, built in one
// data folder and confirmed in another; what is not the same is not signed.
func TestASecondBuilderConfirms(t *testing.T) {
	k := kerneltest.Prepared(t)
	release := string(k.Entry.Release)
	dirs := map[string]string{"a": filepath.Join(t.TempDir(), "a"), "b": filepath.Join(t.TempDir(), "b")}
	run := func(dir string, args ...string) (string, int) {
		t.Helper()
		out, said, exit := program(t, append([]string{"--quiet", "--dir", dirs[dir], "--cache", k.Cache}, args...)...)
		return out + said, exit
	}
	must := func(dir string, args ...string) string {
		t.Helper()
		out, exit := run(dir, args...)
		if exit != 0 {
			t.Fatalf("%q: exit status %d\n%s", args, exit, out)
		}
		return out
	}
	refused := func(code, dir string, args ...string) {
		t.Helper()
		if out, exit := run(dir, args...); exit != 3 || !strings.Contains(out, "("+code+")") || !strings.Contains(out, "hint: ") {
			t.Errorf("%q: exit status %d, want 3 and %s\n%s", args, exit, code, out)
		}
	}
	for name, dir := range dirs {
		must(name, "init", dir, "--profile", "full", "--publisher", "example.org")
		if err := catalog.Save(dir, k.Entry); err != nil {
			t.Fatal(err)
		}
	}
	line := must("b", "evidence", "key", "--role", "builder", "--name", "builder-b")
	key := strings.Fields(line)[len(strings.Fields(line))-1]
	must("a", "evidence", "allow", "--role", "builder", "--name", "builder-b", key)

	const file = "fs/proc/cmdline.c"
	old, err := os.ReadFile(filepath.Join(k.Tree.Source(), file))
	if err != nil {
		t.Fatal(err)
	}
	edited := filepath.Join(t.TempDir(), "edited")
	if err := os.MkdirAll(filepath.Join(edited, filepath.Dir(file)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(edited, file), []byte(strings.Replace(string(old), `'\n'`, `' '`, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	diff, err := queue.Change(t.Context(), k.Tree.Source(), edited, []string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	patch := filepath.Join(t.TempDir(), "fix.patch")
	if err := os.WriteFile(patch, diff, 0o644); err != nil {
		t.Fatal(err)
	}
	must("a", "queue", "add", patch, "--series", k.Entry.Series, "--fixes", "CVE-2000-0001", "--author", "Alice <alice@example.org>")
	must("a", "build", "--kernel", release)
	first := build.Dir(dirs["a"], k.Entry.Release, 1)
	refused("too_few_builders", "a", "sign", "--kernel", release)

	// What the second builder has to notice by itself.
	spoiled := func(name string, change func(string) string) string {
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, os.DirFS(first)); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if changed := change(string(b)); changed != string(b) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(changed), 0o644); err != nil {
				t.Fatal(err)
			}
			return dir
		}
		t.Fatalf("nothing to change in %s", name)
		return ""
	}
	refused("other_plan", "b", "confirm", "--from", spoiled(build.PlanFile, func(s string) string {
		return strings.Replace(s, "CVE-2000-0001", "CVE-2000-0002", 1)
	}), "--as", "builder-b")
	kernel := spoiled(build.PlanFile, func(s string) string { return strings.Replace(s, k.Entry.ConfigSHA256, strings.Repeat("0", 64), 1) })
	refused("other_plan", "b", "confirm", "--from", kernel, "--as", "builder-b")
	other := k.Entry
	other.Packages = map[string]string{"linux-image": "another"}
	if err := catalog.Save(dirs["b"], other); err != nil {
		t.Fatal(err)
	}
	refused("inputs_differ", "b", "confirm", "--from", first, "--as", "builder-b")
	if err := catalog.Save(dirs["b"], k.Entry); err != nil {
		t.Fatal(err)
	}
	bytesDiffer := spoiled("build.json", func(s string) string {
		return regexp.MustCompile(`"sha256": "[0-9a-f]{64}"`).ReplaceAllString(s, `"sha256": "`+strings.Repeat("0", 64)+`"`)
	})
	refused("builders_differ", "b", "confirm", "--from", bytesDiffer, "--as", "builder-b")
	statement := filepath.Join(build.Dir(dirs["b"], k.Entry.Release, 1), "evidence", "builder-builder-b.json")
	if _, err := os.Stat(statement); !os.IsNotExist(err) {
		t.Errorf("something was signed: %v", err)
	}

	if out := must("b", "confirm", "--from", first, "--as", "builder-b"); !strings.Contains(out, "confirmed by builder-b") {
		t.Errorf("confirm says\n%s", out)
	}
	must("a", "evidence", "add", "--kernel", release, statement)
	refused("not_tested", "a", "sign", "--kernel", release) // both builders count now
	if out := must("a", "review", "--kernel", release); !strings.Contains(out, "Alice <alice@example.org>") || !strings.Contains(out, "+++ b/"+file) {
		t.Errorf("what a reviewer sees:\n%s", out)
	}
}
