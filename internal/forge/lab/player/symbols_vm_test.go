// SPDX-License-Identifier: Apache-2.0

//go:build vm

package player_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// TestSymbolsOfTheBootedKernel tries a livepatch of vmlinux and of modules as
// the gate does: the tables that the builder used are the running kernel's, and
// what it replaced is what was built. With one wrong address in the table the
// gate fails.
func TestSymbolsOfTheBootedKernel(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	b := builtFor(t, k, map[string][2]string{
		// c_start is there three times; this is the second.
		"fs/proc/consoles.c":  {"\tloff_t off = 0;\n\n\tconsole_lock();", "\tloff_t off = 0;\n\n\tasm volatile(\"nop\");\n\tconsole_lock();"},
		"drivers/net/dummy.c": {"\tdev->min_mtu = 0;\n", "\tasm volatile(\"nop\");\n\tdev->min_mtu = 0;\n"},
		// needs another module
		"net/ipv4/ip_gre.c": {"\tdev->netdev_ops\t\t= &ipgre_netdev_ops;\n", "\tasm volatile(\"nop\");\n\tdev->netdev_ops\t\t= &ipgre_netdev_ops;\n"},
	})
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	try := func(table string, only ...string) proof.Result {
		t.Helper()
		res, err := proof.Run(t.Context(), proof.Trial{Rig: rig, Kernel: k.Tree.Image(), Built: b, Only: only,
			Tables: proof.Tables{Vmlinux: table, Module: k.Tree.ModuleFile}, Again: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range res.Scenarios {
			t.Logf("%-26s %-6s %5.1f s %s%s", s.Name, s.Verdict, s.Seconds, s.Note, s.Why)
		}
		return res
	}
	if res := try(k.Tree.Symbols(), "load-and-disable", "late-module"); proof.Worst(res.Scenarios) != lab.Pass {
		t.Errorf("verdict %s: %+v", res.Verdict, res.Trouble)
	}
	text, err := os.ReadFile(k.Tree.Symbols())
	if err != nil {
		t.Fatal(err)
	}
	wrong := filepath.Join(t.TempDir(), "table")
	moved := false
	lines := strings.Split(string(text), "\n")
	for i, l := range lines {
		if w := strings.Fields(l); len(w) == 8 && w[7] == "c_start" && !moved {
			lines[i], moved = strings.Replace(l, w[1], w[1][:15]+"8", 1), true
		}
	}
	if err := os.WriteFile(wrong, []byte(strings.Join(lines, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	res := try(wrong, "load-and-disable")
	last := res.Scenarios[len(res.Scenarios)-1]
	if !moved || res.Verdict != lab.Fail || last.Steps[len(last.Steps)-1].Text != "[symbols] symbols" || !strings.Contains(last.Why, "c_start") {
		t.Errorf("a wrong table: verdict %s at %s: %s", res.Verdict, last.Name, last.Why)
	}
}

// builtFor builds one livepatch of edits: by file, what is replaced by what.
func builtFor(t *testing.T, k kerneltest.Kernel, edits map[string][2]string) build.Result {
	t.Helper()
	dir := t.TempDir()
	var files []string
	for f, e := range edits {
		old, err := os.ReadFile(filepath.Join(k.Tree.Source(), f))
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.Replace(string(old), e[0], e[1], 1)
		if changed == string(old) {
			t.Fatalf("the change does not fit %s", f)
		}
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, f), []byte(changed), 0o644); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	diff, err := queue.Change(t.Context(), k.Tree.Source(), dir, files, nil)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := compose.New(k.Entry, []queue.Patch{{Name: "edits", Fixes: []cve.ID{"CVE-2000-0001"}, Diff: diff, Files: files}}, k.Tools.Version(), 1)
	if err != nil {
		t.Fatal(err)
	}
	res, err := build.Run(t.Context(), &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}, plan, t.TempDir(), build.NewClock(nil))
	if err != nil || res.Result != build.Built {
		t.Fatalf("%v: %s %s %+v", err, res.Result, res.Error, res.Refusals)
	}
	t.Logf("functions %v", res.Functions)
	return res
}
