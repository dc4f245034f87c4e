// SPDX-License-Identifier: Apache-2.0

//go:build vm

package klpbuild_test

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/klpbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// edit makes a source patch by changing a file of the real tree, or what an
// earlier source patch made of it, while the test runs: no kernel code is in
// this repository.
func edit(t testing.TB, k kerneltest.OwnKernel, id cve.ID, file string, earlier, change func(string) string) queue.Patch {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(k.Tree.Source(), file))
	if err != nil {
		t.Fatal(err)
	}
	old := string(b)
	if earlier != nil {
		old = earlier(old)
	}
	changed := change(old)
	if changed == old {
		t.Fatalf("the change does not fit %s", file)
	}
	was, is := t.TempDir(), t.TempDir()
	for dir, content := range map[string]string{was: old, is: changed} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	diff, err := queue.Change(t.Context(), was, is, []string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return queue.Patch{Name: string(id), Fixes: []cve.ID{id}, Diff: diff, Files: []string{file}}
}

func replace(old, changed string) func(string) string {
	return func(s string) string { return strings.Replace(s, old, changed, 1) }
}

// nopIn adds one instruction at the start of a function.
func nopIn(function string) func(string) string {
	return func(s string) string {
		head, rest, ok := strings.Cut(s, "\n"+function)
		params, body, ok2 := strings.Cut(rest, "\n{\n")
		if !ok || !ok2 || strings.Contains(params, ";") {
			return s
		}
		return head + "\n" + function + params + "\n{\n\tasm volatile(\"nop\");\n" + body
	}
}

func plan(t testing.TB, k kerneltest.OwnKernel, patches ...queue.Patch) compose.Plan {
	t.Helper()
	p, err := compose.New(k.Entry, patches, k.Tools, 1)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func run(t testing.TB, cache string, p compose.Plan) (build.Result, string) {
	t.Helper()
	data := t.TempDir()
	res, err := build.Run(context.WithoutCancel(t.Context()), &klpbuild.Driver{Cache: cache}, p, data, build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	if res.Result == build.Broken {
		t.Fatalf("broken: %s", res.Error)
	}
	t.Logf("seconds %v", res.Seconds)
	return res, data
}

const (
	cmdline = "fs/proc/cmdline.c"
	dummy   = "drivers/net/dummy.c"
	mark    = "livepatched by klatch"
)

var (
	afterNewline = replace("seq_putc(m, '\\n');", "seq_putc(m, '\\n');\n\tseq_puts(m, \"first\\n\");")
	better       = replace("\"first\\n\"", "\""+mark+"\\n\"")
)

// fixes is a queue: two source patches of one line, the second on top of the
// first, and one of a module.
func fixes(t testing.TB, k kerneltest.OwnKernel) []queue.Patch {
	return []queue.Patch{
		edit(t, k, "CVE-2000-0001", cmdline, nil, afterNewline),
		edit(t, k, "CVE-2000-0002", cmdline, afterNewline, better),
		edit(t, k, "CVE-2000-0003", dummy, nil, replace("dev->max_mtu = 0;", "dev->max_mtu = 0;\n\tdev->mtu = 1234;")),
	}
}

var replacedByFixes = []livepatch.Function{{Object: "dummy", Name: "dummy_setup"}, {Object: "vmlinux", Name: "cmdline_proc_show"}}

// good is the livepatch of fixes, built once for all tests.
var good = struct {
	sync.Once
	res build.Result
}{}

func goodBuild(t *testing.T, k kerneltest.OwnKernel) build.Result {
	t.Helper()
	good.Do(func() {
		res, data := run(t, k.Cache, plan(t, k, fixes(t, k)...))
		if res.Result == build.Built {
			kept, err := os.ReadFile(res.Module.Path)
			if err != nil {
				t.Fatal(err)
			}
			dir, err := os.MkdirTemp("/var/tmp", "klatch-klpbuild-test-")
			if err != nil {
				t.Fatal(err)
			}
			res.Module.Path = filepath.Join(dir, "klatch_1.ko")
			if err := os.WriteFile(res.Module.Path, kept, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		_ = data
		good.res = res
	})
	if good.res.Result != build.Built {
		t.Fatalf("result %s: %+v", good.res.Result, good.res.Refusals)
	}
	return good.res
}

func TestBuildsAndProvesAQueueOfKernelAndModule(t *testing.T) {
	k := kerneltest.Own(t)
	res := goodBuild(t, k)
	if !slices.Equal(res.Functions, replacedByFixes) {
		t.Errorf("functions %v, want %v", res.Functions, replacedByFixes)
	}
	m := res.Match
	if len(m.Replaced) != 2 || m.Checked < 5 || m.Identical < m.Checked-1 {
		t.Errorf("match: %d of %d, replaced %+v, different %+v", m.Identical, m.Checked, m.Replaced, m.Different)
	}
	for _, p := range m.Replaced {
		if p.Bytes < 20 || p.Relocations < 2 {
			t.Errorf("proof %+v", p)
		}
	}
	if want := []cve.ID{"CVE-2000-0001", "CVE-2000-0002", "CVE-2000-0003"}; !slices.Equal(res.Fixes, want) {
		t.Errorf("fixes %v", res.Fixes)
	}
	info := modinfo(t, res.Module.Path)
	for _, want := range []string{"name=klatch_1", "livepatch=Y", "klatch_fixes=CVE-2000-0001,CVE-2000-0002,CVE-2000-0003",
		"klatch_build_id=" + k.Entry.BuildID.String(), "klatch_sequence=1"} {
		if !slices.Contains(info, want) {
			t.Errorf("module says %q, want %s", info, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(k.Cache, "builds", "*")); len(left) != 0 {
		t.Errorf("scratch folders left: %v", left)
	}
}

func modinfo(t *testing.T, file string) []string {
	t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := f.Section(".modinfo").Data()
	if err != nil {
		t.Fatal(err)
	}
	if f.Section(".gnu.linkonce.this_module") == nil {
		t.Error("no module")
	}
	return strings.Split(string(b), "\x00")
}

// load loads the livepatch over an earlier one of another sequence, waits for
// the transition, and tells what the kernel says then.
const story = `set -e
echo "before: $(tail -n1 /proc/cmdline)"
insmod /lab/klatch_1.ko
i=0; while [ "$(cat /sys/kernel/livepatch/klatch_1/transition)" = 1 ]; do usleep 100000; i=$((i+1)); [ $i -lt 400 ]; done
echo "replace: $(cat /sys/kernel/livepatch/klatch_1/replace)"
echo "after: $(tail -n1 /proc/cmdline)"
insmod /lab/dummy.ko
echo "mtu: $(cat /sys/class/net/dummy0/mtu)"
echo 0 > /sys/kernel/livepatch/klatch_1/enabled
i=0; while [ -d /sys/kernel/livepatch/klatch_1 ]; do usleep 100000; i=$((i+1)); [ $i -lt 400 ]; done
echo "disabled: $(tail -n1 /proc/cmdline)"
rmmod klatch_1
`

// TestLivepatchWorksOnItsKernel loads it into the own kernel, in QEMU: the
// kernel's code changes, so does that of a module that comes later, and all of
// it goes back.
func TestLivepatchWorksOnItsKernel(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Own(t)
	res := goodBuild(t, k)
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Scratch: t.TempDir(), Accelerator: "tcg"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := rig.Boot(t.Context(), lab.Spec{Name: "own", Kernel: k.Tree.Image(), Files: []lab.File{
		{Name: "klatch_1.ko", Source: res.Module.Path}, {Name: "dummy.ko", Source: k.Tree.ModuleFile("dummy")}}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	out, err := m.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c", story}})
	if err != nil {
		t.Fatal(err)
	}
	console, err := m.Console()
	if err != nil {
		t.Fatal(err)
	}
	if out.Exit != 0 {
		t.Fatalf("status %d\n%s%s\nconsole:\n%s", out.Exit, out.Stdout, out.Stderr, console)
	}
	said := map[string]string{}
	for line := range strings.Lines(string(out.Stdout)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		said[key] = value
	}
	if said["before"] == mark || said["after"] != mark || said["disabled"] != said["before"] || said["mtu"] != "1234" || said["replace"] != "1" {
		t.Errorf("the guest says\n%s", out.Stdout)
	}
	if v, trouble := lab.Judge(nil, console); v != lab.Pass {
		t.Errorf("console: %s %+v", v, trouble)
	}
}

// elsewhere is a second cache with the same kernel in another folder; change
// may spoil what is known of the kernel.
func elsewhere(t testing.TB, k kerneltest.OwnKernel, change func(kerneltree.Tree)) string {
	t.Helper()
	cache, err := os.MkdirTemp("/var/tmp", "klatch-other-cache-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(cache) })
	there := kerneltree.At(cache, k.Entry)
	upper, work := filepath.Join(cache, "upper"), filepath.Join(cache, "work")
	for _, d := range []string{there.Source(), upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(cache, 0o755), sandbox.Own(upper), sandbox.Own(work)); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(k.Tree.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		from, to := filepath.Join(k.Tree.Dir, f.Name()), filepath.Join(there.Dir, f.Name())
		switch {
		case f.Name() == "modules":
			err = os.Symlink(from, to)
		case f.IsDir():
		default:
			var b []byte
			if b, err = os.ReadFile(from); err == nil {
				err = os.WriteFile(to, b, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mount("overlay", there.Source(), "overlay", 0,
		fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", k.Tree.Source(), upper, work)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(there.Source(), syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if change != nil {
		change(there)
	}
	return cache
}

func TestSameInputsSameBytes(t *testing.T) {
	k := kerneltest.Own(t)
	first := goodBuild(t, k)
	second, _ := run(t, elsewhere(t, k, nil), plan(t, k, fixes(t, k)...))
	if second.Result != build.Built {
		t.Fatalf("result %s: %+v", second.Result, second.Refusals)
	}
	if first.Module.SHA256 != second.Module.SHA256 {
		a, _ := os.ReadFile(first.Module.Path)
		b, _ := os.ReadFile(second.Module.Path)
		i := 0
		for i < min(len(a), len(b)) && a[i] == b[i] {
			i++
		}
		t.Errorf("two builds differ: %s, %s, from byte %d of %d and %d", first.Module.SHA256, second.Module.SHA256, i, len(a), len(b))
	}
	if first.Plan != second.Plan {
		t.Errorf("plans differ: %s, %s", first.Plan, second.Plan)
	}
}

// TestOtherKernelIsRefused: what runs has one other byte in the function that
// the fix replaces.
func TestOtherKernelIsRefused(t *testing.T) {
	k := kerneltest.Own(t)
	const function = "cmdline_proc_show"
	cache := elsewhere(t, k, func(there kerneltree.Tree) { flip(t, there.Vmlinux(), function) })
	res, _ := run(t, cache, plan(t, k, edit(t, k, "CVE-2000-0001", cmdline, nil, afterNewline)))
	if res.Result != build.Refused || len(res.Refusals) != 1 {
		t.Fatalf("result %s, refusals %+v", res.Result, res.Refusals)
	}
	if r := res.Refusals[0]; r.Code != "match_failed" || r.Function != function || r.File != cmdline || r.Detail == "" {
		t.Errorf("refusal %+v", r)
	}
}

// flip changes the last byte of a function in a vmlinux.
func flip(t *testing.T, vmlinux, function string) {
	t.Helper()
	f, err := elf.Open(vmlinux)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(vmlinux)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range symbols {
		if s.Name == function && int(s.Section) < len(f.Sections) {
			in := f.Sections[s.Section]
			b[in.Offset+s.Value-in.Addr+s.Size-1] ^= 0xff
			if err := os.WriteFile(vmlinux, b, 0o644); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("vmlinux has no function %s", function)
}

func TestRefusesWhatItCannotDo(t *testing.T) {
	k := kerneltest.Own(t)
	one := func(file string, change func(string) string) queue.Patch {
		return edit(t, k, "CVE-2000-0001", file, nil, change)
	}
	comment := func(s string) string { return s + "/* more */\n" }
	for _, c := range []struct {
		name     string
		code     fault.Code
		function string
		p        queue.Patch
	}{
		{"assembly", "assembly", "", one("arch/x86/lib/memmove_64.S", comment)},
		{"a file below lib/", "lib_code", "", one("lib/kstrtox.c", comment)},
		{"the vDSO", "boot_image", "", one("arch/x86/entry/vdso/common/vgetcpu.c", comment)},
		{"a makefile", "not_code", "", one("fs/proc/Makefile", func(s string) string { return s + "# more\n" })},
		{"a patch for other source", "patch_does_not_apply", "", queue.Patch{Name: "x", Fixes: []cve.ID{"CVE-2000-0001"}, Files: []string{cmdline},
			Diff: []byte("--- a/" + cmdline + "\n+++ b/" + cmdline + "\n@@ -10,3 +10,4 @@\n no such line\n+more\n nor this\n nor that\n")}},
		{"source that does not compile", "does_not_compile", "", one(cmdline, func(s string) string { return s + "int x = y;\n" })},
		{"a symbol that nobody has", "symbol_missing", "klatch_nowhere", one(cmdline, func(s string) string {
			return nopIn("static int cmdline_proc_show(")("extern void klatch_nowhere(void);\n" + replace("seq_putc(m, '\\n');", "seq_putc(m, '\\n');\n\tklatch_nowhere();")(s))
		})},
		{"only a comment", "nothing_changed", "", one(cmdline, comment)},
		{"code of boot time", "init_code", "proc_cmdline_init", one(cmdline, nopIn("static int __init proc_cmdline_init("))},
		{"initialized data", "data_changed", "", one("kernel/panic.c", replace("bool crash_kexec_post_notifiers;", "bool crash_kexec_post_notifiers = true;"))},
	} {
		t.Run(c.name, func(t *testing.T) {
			res, data := run(t, k.Cache, plan(t, k, c.p))
			if res.Result != build.Refused || len(res.Refusals) == 0 {
				t.Fatalf("result %s: %+v", res.Result, res)
			}
			r := res.Refusals[0]
			if r.Code != c.code || r.File != c.p.Files[0] || r.Rule == "" || r.Hint == "" || c.function != "" && r.Function != c.function {
				t.Errorf("refusal %+v, want code %s of %s with rule and hint", r, c.code, c.function)
			}
			if left, _ := filepath.Glob(filepath.Join(data, "out", "*", "*")); len(left) != 0 {
				t.Errorf("something was written: %v", left)
			}
		})
	}
	t.Run("a file that this kernel is not built from", func(t *testing.T) {
		res, _ := run(t, k.Cache, plan(t, k, one("net/sctp/socket.c", comment)))
		if res.Result != build.NotAffected || !slices.Equal(res.NotBuilt, []string{"net/sctp/socket.c"}) {
			t.Errorf("result %s, not built %v", res.Result, res.NotBuilt)
		}
	})
}
