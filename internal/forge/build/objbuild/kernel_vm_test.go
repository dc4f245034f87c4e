// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/kerneltest"
)

// edit makes a source patch by changing a file of the real tree while the test
// runs: no kernel code is in this repository.
func edit(t testing.TB, k kerneltest.Kernel, file string, change func(string) string) queue.Patch {
	t.Helper()
	old, err := os.ReadFile(filepath.Join(k.Tree.Source(), file))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o755); err != nil {
		t.Fatal(err)
	}
	changed := change(string(old))
	if changed == string(old) {
		t.Fatalf("the change does not fit %s", file)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	diff, err := queue.Change(t.Context(), k.Tree.Source(), dir, []string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return queue.Patch{Name: "edit", Fixes: []cve.ID{"CVE-2000-0001"}, Diff: diff, Files: []string{file}}
}

// nopIn adds one instruction at the start of a function.
func nopIn(function string) func(string) string {
	return func(s string) string {
		for from := 0; ; {
			i := strings.Index(s[from:], "\n"+function)
			if i < 0 {
				return s
			}
			head, _, found := strings.Cut(s[from+i:], "\n{\n")
			if found && !strings.Contains(head, ";") { // not a declaration
				j := from + i + len(head) + len("\n{\n")
				return s[:j] + "\tasm volatile(\"nop\");\n" + s[j:]
			}
			from += i + 1
		}
	}
}

func run(t *testing.T, k kerneltest.Kernel, cache string, patches ...queue.Patch) (build.Result, string) {
	t.Helper()
	plan, err := compose.New(k.Entry, patches, k.Tools.Version(), 1)
	if err != nil {
		t.Fatal(err)
	}
	data := t.TempDir()
	res, err := build.Run(context.WithoutCancel(t.Context()), &objbuild.Driver{Cache: cache, Tools: k.Tools}, plan, data, build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	if res.Result == build.Broken {
		t.Fatalf("broken: %s", res.Error)
	}
	return res, data
}

const dgramSendmsg = "static int unix_dgram_sendmsg("

func TestBuildsAndProvesAFix(t *testing.T) {
	k := kerneltest.Prepared(t)
	p := edit(t, k, "net/unix/af_unix.c", nopIn(dgramSendmsg))
	res, data := run(t, k, k.Cache, p)
	if res.Result != build.Built {
		t.Fatalf("result %s: %+v", res.Result, res.Refusals)
	}
	want := []livepatch.Function{{Object: "vmlinux", Name: "unix_dgram_sendmsg"}}
	if !slices.Equal(res.Functions, want) {
		t.Errorf("functions %v, want %v", res.Functions, want)
	}
	m := res.Match
	if len(m.Replaced) != 1 || m.Replaced[0].Function != "unix_dgram_sendmsg" || m.Replaced[0].Bytes < 100 || m.Replaced[0].Relocations < 10 {
		t.Errorf("proof %+v", m.Replaced)
	}
	if m.Checked < 50 || m.Identical < m.Checked-2 || len(m.Environment) != 0 {
		t.Errorf("match: %d of %d, environment %v", m.Identical, m.Checked, m.Environment)
	}
	// The JSON holds what the documentation promises.
	raw, err := os.ReadFile(filepath.Join(build.Dir(data, k.Entry.Release, 1), "build.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"result", "kernel", "build_id", "sequence", "module", "fixes", "functions", "match", "refusals", "seconds"} {
		if _, ok := doc[key]; !ok {
			t.Errorf("build.json lacks %q", key)
		}
	}
}

func TestSameInputsSameBytes(t *testing.T) {
	k := kerneltest.Prepared(t)
	p := edit(t, k, "net/unix/af_unix.c", nopIn(dgramSendmsg))
	a, _ := run(t, k, k.Cache, p)
	b, _ := run(t, k, kerneltest.OtherCache(t, k, nil), p) // other folders, nothing reused
	if a.Result != build.Built || b.Result != build.Built {
		t.Fatalf("results %s, %s: %+v", a.Result, b.Result, b.Refusals)
	}
	if a.Module.SHA256 != b.Module.SHA256 {
		t.Errorf("two builds differ: %s, %s", a.Module.SHA256, b.Module.SHA256)
	}
	if a.Plan != b.Plan {
		t.Errorf("plans differ: %s, %s", a.Plan, b.Plan)
	}
}

// TestWrongEnvironmentIsRefused: each way in which a build environment can be
// wrong makes other code; the match proof refuses it and names the cause.
func TestWrongEnvironmentIsRefused(t *testing.T) {
	k := kerneltest.Prepared(t)
	p := edit(t, k, "net/unix/af_unix.c", nopIn(dgramSendmsg))
	refusedBy := func(t *testing.T, res build.Result, aspect, function string) {
		t.Helper()
		if res.Result != build.Refused || len(res.Refusals) != 1 || res.Refusals[0].Code != "wrong_environment" {
			t.Fatalf("result %s, refusals %+v, match %+v", res.Result, res.Refusals, res.Match)
		}
		r := res.Refusals[0]
		if r.Function != function || r.File == "" || r.Detail == "" {
			t.Errorf("place %+v", r)
		}
		if !slices.ContainsFunc(res.Match.Environment, func(s match.Setting) bool { return s.Aspect == aspect }) ||
			!strings.Contains(r.Hint, aspect) {
			t.Errorf("the %s is not named: %q, %+v", aspect, r.Hint, res.Match.Environment)
		}
		if res.Module != nil {
			t.Error("a module came out")
		}
	}
	t.Run("compiler flag", func(t *testing.T) {
		k := k
		k.Entry.ExtraCFlags = "-fno-inline-small-functions"
		res, _ := run(t, k, k.Cache, p)
		refusedBy(t, res, "flags", "unix_dgram_sendmsg")
	})
	t.Run("config", func(t *testing.T) {
		cache := kerneltest.OtherCache(t, k, func(tree string) {
			name := filepath.Join(tree, ".config")
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			changed := bytes.Replace(b, []byte("CONFIG_STACKPROTECTOR_STRONG=y\n"), []byte("# CONFIG_STACKPROTECTOR_STRONG is not set\n"), 1)
			if bytes.Equal(b, changed) {
				t.Fatal("the config has no CONFIG_STACKPROTECTOR_STRONG")
			}
			if err := os.WriteFile(name, changed, 0o644); err != nil {
				t.Fatal(err)
			}
		})
		res, _ := run(t, k, cache, p)
		refusedBy(t, res, "config", "unix_dgram_sendmsg")
	})
	t.Run("source version", func(t *testing.T) {
		k := k
		k.Entry.SourceV = newerSource(t, k)
		const file, function = "kernel/time/namespace.c", "proc_timens_set_offset"
		cache := kerneltest.OtherCache(t, k, func(tree string) {
			// The newer upload's file in the older tree: the smallest wrong source.
			dir, err := k.Maker.Files(t.Context(), k.Entry.Source, k.Entry.SourceV, []string{file})
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(tree, file), b, 0o644); err != nil {
				t.Fatal(err)
			}
		})
		k.Cache = cache
		k.Tree = kerneltree.At(cache, k.Entry)
		res, _ := run(t, k, cache, edit(t, k, file, nopIn("int "+function+"(")))
		refusedBy(t, res, "source", function)
	})
}

// newerSource is a version of the source package in which
// unix_dgram_sendmsg is another function.
func newerSource(t *testing.T, k kerneltest.Kernel) string {
	t.Helper()
	all, err := k.Maker.Archive.Versions(t.Context(), k.Entry.Source)
	if err != nil || len(all) < 2 {
		t.Fatalf("versions of %s: %v, %v", k.Entry.Source, all, err)
	}
	return all[0].Version
}

// TestARefusalLeavesNothing: no module, no scratch folder. Every code has a
// case in refusals_vm_test.go.
func TestARefusalLeavesNothing(t *testing.T) {
	k := kerneltest.Prepared(t)
	cache := kerneltest.OtherCache(t, k, nil) // nobody else builds there
	res, data := run(t, k, cache, edit(t, k, "kernel/utsname.c", nopIn("void __init uts_ns_init(")))
	if res.Result != build.Refused || res.Module != nil {
		t.Fatalf("result %s", res.Result)
	}
	if left, _ := filepath.Glob(filepath.Join(data, "out", "*", "*")); len(left) != 0 {
		t.Errorf("something was written: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "builds", "*")); len(left) != 0 {
		t.Errorf("scratch folders left: %v", left)
	}
}
