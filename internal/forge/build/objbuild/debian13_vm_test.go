// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

const cmdlineShow = "static int cmdline_proc_show("

// sayIn makes /proc/cmdline begin with a word, which shows a user that the
// livepatch is in.
func sayIn(s string) string {
	return strings.Replace(nopIn(cmdlineShow)(s), "\tasm volatile(\"nop\");\n", "\tseq_puts(m, \"livepatched \");\n", 1)
}

// sayCheck is 0 where the fix works and 1 where the flaw shows (package proof).
const sayCheck = "#!/bin/sh\nread word rest < /proc/cmdline\n[ \"$word\" = livepatched ]\n"

// TestDebian13 is the whole way for a kernel that another compiler than this
// host's made: built in its root folder, proved, the same bytes again, and live
// in the stock kernel.
func TestDebian13(t *testing.T) {
	k := kerneltest.Debian13(t)
	e := k.Entry
	if e.Buildroot != "debian-13" || e.Toolchain["gcc-14"] == "" || !strings.Contains(e.Compiler, "(Debian "+e.Toolchain["gcc-14"]+")") {
		t.Fatalf("entry: root folder %q with %v for compiler %q", e.Buildroot, e.Toolchain, e.Compiler)
	}
	patches := []queue.Patch{
		edit(t, k, "fs/proc/cmdline.c", sayIn),
		edit(t, k, "net/unix/af_unix.c", nopIn(dgramSendmsg)),
		edit(t, k, "net/key/af_key.c", nopIn("static int pfkey_release(")),
	}
	fix := patches[0].Fixes[0]
	for i := range patches[1:] {
		patches[i+1].Name, patches[i+1].Fixes = patches[i+1].Files[0], nil
	}
	res, _ := run(t, k, k.Cache, patches...)
	if res.Result != build.Built {
		t.Fatalf("result %s: %+v", res.Result, res.Refusals)
	}
	want := []livepatch.Function{{Object: "af_key", Name: "pfkey_release"}, {Object: "vmlinux", Name: "cmdline_proc_show"}, {Object: "vmlinux", Name: "unix_dgram_sendmsg"}}
	if !slices.Equal(res.Functions, want) {
		t.Errorf("functions %v, want %v", res.Functions, want)
	}
	// Some that are not replaced differ in sections of their own; see below.
	if m := res.Match; m.Checked < 100 || m.Identical < m.Checked-8 || len(m.Replaced) != 3 || len(m.Environment) != 0 {
		t.Errorf("match: %d of %d, replaced %+v, different %+v, environment %v", m.Identical, m.Checked, m.Replaced, m.Different, m.Environment)
	}
	t.Logf("%s: %d of %d functions identical, %d bytes, seconds %v", e.Release, res.Match.Identical, res.Match.Checked, res.Module.Bytes, res.Seconds)

	t.Run("as shipped, every function is the kernel's", func(t *testing.T) { asShipped(t, k, patches) })
	t.Run("same inputs, same bytes", func(t *testing.T) {
		again, _ := run(t, k, kerneltest.OtherCache(t, k, nil), patches[0]) // other folders, nothing reused
		first, _ := run(t, k, k.Cache, patches[0])
		if again.Result != build.Built || again.Module.SHA256 != first.Module.SHA256 || again.Plan != first.Plan {
			t.Errorf("two builds differ: %+v, %+v", again, first)
		}
	})
	t.Run("live in the stock kernel", func(t *testing.T) {
		testkit.Need(t, "qemu")
		rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
		if err != nil {
			t.Fatal(err)
		}
		p, err := proof.Run(t.Context(), proof.Trial{Rig: rig, Kernel: k.Tree.Image(), Built: res, CPUs: 1,
			Checks: map[cve.ID][]byte{fix: []byte(sayCheck)}, Only: []string{"load-and-disable", "reboot"}})
		if err != nil || proof.Worst(p.Scenarios) != lab.Pass || !p.Scenarios[0].Checked {
			t.Fatalf("%v: %+v", err, p)
		}
		for _, s := range p.Scenarios {
			t.Logf("%-26s %-6s %.1f s", s.Name, s.Verdict, s.Seconds)
		}
	})
	t.Run("landing pads", func(t *testing.T) { landingPads(t, k) })
	t.Run("this host's compiler is refused", func(t *testing.T) { wrongCompiler(t, k) })
}

// asShipped compiles the touched files as the distribution did, without a
// section for each function: then the root folder must give all of the kernel's
// code, not only what a livepatch replaces.
func asShipped(t *testing.T, k kerneltest.Kernel, patches []queue.Patch) {
	root, err := kerneltree.RootOf(k.Cache, k.Entry)
	if err != nil {
		t.Fatal(err)
	}
	scratch, err := os.MkdirTemp("/var/tmp", "klatch-as-shipped-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(scratch) })
	if err := os.Chmod(scratch, 0o755); err != nil {
		t.Fatal(err)
	}
	units, err := k.Tree.Units()
	if err != nil {
		t.Fatal(err)
	}
	args := append([]string{"KCFLAGS=-g0"}, objbuild.ObjtoolNow...)
	var touched []kerneltree.Unit
	for _, p := range patches {
		touched = append(touched, units.Of(p.Files[0])...)
	}
	for _, u := range touched {
		args = append(args, u.Target)
	}
	c := sandbox.Command{Root: root.Dir, Tree: k.Tree.Source(), Scratch: scratch, Dir: k.Tree.Source(), Argv: kerneltree.Make(k.Entry, args...)}
	if res, err := sandbox.Run(t.Context(), c); err != nil || res.Exit != 0 {
		t.Fatalf("%v, exit %d: %s", err, res.Exit, res.Output)
	}
	r := match.Empty()
	for _, u := range touched {
		var image *match.Image
		if u.Object == "vmlinux" {
			image, err = match.Open(k.Tree.Vmlinux())
		} else {
			image, err = match.OpenModule(k.Tree.ModuleFile(u.Object), u.Object)
		}
		if err == nil {
			err = image.Object(c.Upper(u.Target), u.Source, nil, &r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d of %d functions identical", r.Identical, r.Checked)
	if r.Checked < 100 || r.Identical != r.Checked {
		t.Errorf("%d of %d identical; different: %+v", r.Identical, r.Checked, r.Different)
	}
}

// landingPads lets a patched function call another one by address. A function
// that the kernel itself calls only by name has lost its landing pad at boot; a
// new one that does the same has its own.
func landingPads(t *testing.T, k kerneltest.Kernel) {
	const file, sealed = "fs/proc/cmdline.c", "proc_task_name"
	callBy := func(target, before string) queue.Patch {
		return edit(t, k, file, func(s string) string {
			s = strings.Replace(nopIn(cmdlineShow)(s), "\tasm volatile(\"nop\");\n",
				"\tvoid (*volatile say)(struct seq_file *, struct task_struct *, bool) = "+target+";\n\tsay(m, current, true);\n", 1)
			return strings.Replace(s, cmdlineShow, before+cmdlineShow, 1)
		})
	}
	res, _ := run(t, k, k.Cache, callBy(sealed, ""))
	if res.Result != build.Refused || len(res.Refusals) != 1 || res.Refusals[0].Code != "landing_pad_gone" || res.Refusals[0].Function != sealed {
		t.Errorf("result %s, refusals %+v", res.Result, res.Refusals)
	}
	res, _ = run(t, k, k.Cache, callBy("klatch_say",
		"static noinline void klatch_say(struct seq_file *m, struct task_struct *p, bool escape)\n{\n\t"+sealed+"(m, p, escape);\n}\n\n"))
	if res.Result != build.Built {
		t.Errorf("a new function that calls it by name: result %s, refusals %+v, %s", res.Result, res.Refusals, res.Error)
	}
}

// wrongCompiler builds with the host's gcc, as an entry without a root folder
// would make it: in a tree prepared by that compiler, so that nothing but the
// match proof can notice.
func wrongCompiler(t *testing.T, k kerneltest.Kernel) {
	k.Entry.Buildroot, k.Entry.Toolchain, k.Entry.CC = "", nil, "gcc-12"
	cache := kerneltest.OtherCache(t, k, func(tree string) {
		// What was compiled for the root folder's libraries cannot be linked here.
		err := filepath.WalkDir(filepath.Join(tree, "tools"), func(p string, d fs.DirEntry, err error) error {
			if ext := filepath.Ext(p); err == nil && (ext == ".o" || ext == ".a" || d.Name() == "fixdep") {
				return os.Remove(p)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, target := range []string{"olddefconfig", "modules_prepare"} {
			res, err := sandbox.Run(t.Context(), sandbox.Command{Dir: tree, Writable: []string{tree}, Argv: kerneltree.Make(k.Entry, target)})
			if err != nil || res.Exit != 0 {
				t.Fatalf("make %s: %v, exit %d: %s", target, err, res.Exit, res.Output)
			}
		}
	})
	res, _ := run(t, k, cache, edit(t, k, "net/unix/af_unix.c", nopIn(dgramSendmsg)))
	if res.Result != build.Refused || len(res.Refusals) != 1 || res.Refusals[0].Code != "wrong_environment" {
		t.Fatalf("result %s, refusals %+v, match %+v", res.Result, res.Refusals, res.Match)
	}
	r := res.Refusals[0]
	for _, want := range []string{"compiler is gcc-12 (Debian 12.", "the kernel's is " + k.Entry.Compiler} {
		if !strings.Contains(r.Hint, want) {
			t.Errorf("hint %q lacks %q", r.Hint, want)
		}
	}
	if r.Function != "unix_dgram_sendmsg" || r.File != "net/unix/af_unix.c" || r.Detail == "" || res.Module != nil {
		t.Errorf("refusal %+v, module %v", r, res.Module)
	}
}
