// SPDX-License-Identifier: Apache-2.0

//go:build vm

package source_test

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/buildtest"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/build/source"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// buildAs builds a plan as a sequence and wants it built.
func buildAs(t *testing.T, b build.Builder, p compose.Plan, s livepatch.Sequence) build.Result {
	t.Helper()
	res := buildAny(t, b, p, s)
	if res.Result != build.Built {
		t.Fatalf("result %s, error %q, refusals %+v", res.Result, res.Error, res.Refusals)
	}
	return res
}

func buildAny(t *testing.T, b build.Builder, p compose.Plan, s livepatch.Sequence) build.Result {
	t.Helper()
	p.Sequence = s
	res, err := build.Run(context.WithoutCancel(t.Context()), b, p, t.TempDir(), build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// says makes objbuild's livepatch of the function that the fixture replaces.
func says(t *testing.T, k kerneltest.Kernel, word string, s livepatch.Sequence) build.Result {
	t.Helper()
	old, err := os.ReadFile(filepath.Join(k.Tree.Source(), showFile))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	changed := strings.Replace(string(old), `seq_putc(m, '\n');`, `seq_puts(m, " klatch `+word+`\n");`, 1)
	if changed == string(old) {
		t.Fatalf("the change does not fit %s", showFile)
	}
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(showFile)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, showFile), []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	diff, err := queue.Change(t.Context(), k.Tree.Source(), dir, []string{showFile}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := compose.New(k.Entry, []queue.Patch{{Name: word, Fixes: []cve.ID{"CVE-2000-0001"}, Diff: diff, Files: []string{showFile}}}, k.Tools.Version(), s)
	if err != nil {
		t.Fatal(err)
	}
	return buildAs(t, &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}, p, s)
}

func rig(t *testing.T, k kerneltest.Kernel) *qemu.Rig {
	t.Helper()
	r, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestReplacesAcrossDrivers: a hand-written livepatch replaces one of objbuild
// and is replaced by one, each with the cumulative check of the gate.
func TestReplacesAcrossDrivers(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	one, three := says(t, k, "one", 1), says(t, k, "three", 3)
	two := buildAs(t, &source.Driver{Cache: k.Cache}, plan(k, handwritten(t)), 2)
	check := []byte("#!/bin/sh\ngrep -q klatch /proc/cmdline\n")
	t.Run("hand-written over objbuild", func(t *testing.T) {
		buildtest.Replace(t, rig(t, k), k.Tree.Image(), []build.Result{one, two}, "CVE-2000-0001", check)
	})
	t.Run("objbuild over both", func(t *testing.T) {
		buildtest.Replace(t, rig(t, k), k.Tree.Image(), []build.Result{one, two, three}, "CVE-2000-0001", check)
	})
	t.Run("callbacks and the shadow variable", func(t *testing.T) { testCallbacks(t, k, two, three) })
}

// guest is a machine with livepatches to load.
type guest struct {
	*testing.T
	m lab.Machine
}

func boot(t *testing.T, k kerneltest.Kernel, files []lab.File, rs ...build.Result) guest {
	t.Helper()
	for _, r := range rs {
		files = append(files, lab.File{Name: filepath.Base(r.Module.Path), Source: r.Module.Path})
	}
	m, err := rig(t, k).Boot(t.Context(), lab.Spec{Name: "source", Kernel: k.Tree.Image(), Files: files})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		text, err := m.Console()
		if v, trouble := lab.Judge(err, text); v != lab.Pass {
			t.Errorf("verdict %s: %+v", v, trouble)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return guest{t, m}
}

func (g guest) sh(script string) string {
	g.Helper()
	res, err := g.m.Run(g.Context(), lab.Command{Argv: []string{"sh", "-c", script}, Timeout: time.Minute})
	if err != nil || res.Exit != 0 {
		g.Fatalf("%s: exit status %d, %v\n%s%s", script, res.Exit, err, res.Stdout, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

// load waits for the end of the transition, disable for the end of the
// livepatch; both are limited by sh.
func (g guest) load(r build.Result) {
	g.Helper()
	name := r.Sequence.ModuleName()
	g.sh("insmod /lab/" + name + ".ko && while [ $(cat /sys/kernel/livepatch/" + name + "/transition) = 1 ]; do usleep 100000; done")
}

func (g guest) disable(r build.Result) {
	g.Helper()
	name := r.Sequence.ModuleName()
	g.sh("echo 0 > /sys/kernel/livepatch/" + name + "/enabled && while [ -d /sys/kernel/livepatch/" + name + " ]; do usleep 100000; done; rmmod " + name)
}

func (g guest) said(line string) int {
	g.Helper()
	n, err := strconv.Atoi(g.sh("dmesg | grep -c '" + line + "' || true"))
	if err != nil {
		g.Fatal(err)
	}
	return n
}

// testCallbacks tells what the howto promises of callbacks and shadow
// variables, on a real kernel.
func testCallbacks(t *testing.T, k kerneltest.Kernel, hand, other build.Result) {
	g := boot(t, k, nil, hand, other)
	reads := func(want string) {
		t.Helper()
		if got := g.sh("cat /proc/cmdline"); got != "klatch counts_reads: "+want {
			t.Errorf("got %q, want read %s", got, want)
		}
	}
	ran := func(pre, post int) {
		t.Helper()
		if a, b := g.said("pre_patch ran"), g.said("post_unpatch ran"); a != pre || b != post {
			t.Errorf("callbacks ran %d and %d times, want %d and %d", a, b, pre, post)
		}
	}
	g.load(hand)
	ran(1, 0)
	reads("1")
	reads("2")

	// Replaced: the old livepatch's callbacks do not run, the variable stays.
	g.load(other)
	if got := g.sh("cat /proc/cmdline"); !strings.HasSuffix(got, " klatch three") {
		t.Errorf("after the replace: %q", got)
	}
	g.sh("rmmod " + hand.Sequence.ModuleName())
	g.disable(other)
	ran(1, 0)

	// Whoever comes next finds it.
	g.load(hand)
	ran(2, 0)
	reads("3")

	// Disabled: the callback runs and frees it.
	g.disable(hand)
	ran(2, 1)
	g.load(hand)
	reads("1")
	g.disable(hand)
	ran(3, 2)
}

// places replaces a function whose name is twelve times in vmlinux, and one of
// a module that is not loaded yet.
const placesTOML = `fixes = ["CVE-2000-0001"]
[[function]]
object = "vmlinux"
name = "type_show"
position = POSITION
file = "kernel/irq/irqdesc.c"
[[function]]
object = "loop"
name = "loop_attr_do_show_offset"
file = "drivers/block/loop.c"
`

const placesC = `#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sysfs.h>
#include <linux/device.h>
static ssize_t type(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "klatch\n");
}
static ssize_t offset(struct device *d, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "klatch\n");
}
static struct klp_func core[] = { { .old_name = "type_show", .new_func = type, .old_sympos = POSITION }, { } };
static struct klp_func loop[] = { { .old_name = "loop_attr_do_show_offset", .new_func = offset }, { } };
static struct klp_object objs[] = { { .funcs = core }, { .name = "loop", .funcs = loop }, { } };
static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };
static int __init places_init(void) { return klp_enable_patch(&patch); }
static void __exit places_exit(void) { }
module_init(places_init);
module_exit(places_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
`

func places(t *testing.T, position string) *queue.Handwritten {
	t.Helper()
	fill := func(s string) []byte { return []byte(strings.ReplaceAll(s, "POSITION", position)) }
	h, err := queue.ParseHandwritten([]queue.SourceFile{{Name: queue.DeclaredName, Content: fill(placesTOML)}, {Name: "places.c", Content: fill(placesC)}})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestPositionsAndModules: the position that the builder insists on is the one
// that the booted kernel takes, and a module that is loaded later is patched.
func TestPositionsAndModules(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	d := &source.Driver{Cache: k.Cache}
	res := buildAny(t, d, plan(k, places(t, "0")), 4)
	i := slices.IndexFunc(res.Refusals, func(r build.Refusal) bool { return r.Code == "no_such_function" && r.Function == "type_show" })
	if i < 0 {
		t.Fatalf("an ambiguous name: result %s, refusals %+v", res.Result, res.Refusals)
	}
	m := regexp.MustCompile(`is at position (\d+)`).FindStringSubmatch(res.Refusals[i].Detail)
	if m == nil {
		t.Fatalf("no position in %q", res.Refusals[i].Detail)
	}
	built := buildAs(t, d, plan(k, places(t, m[1])), 4)
	want := []livepatch.Function{{Object: "loop", Name: "loop_attr_do_show_offset"}, {Object: "vmlinux", Name: "type_show"}}
	if !slices.Equal(built.Functions, want) {
		t.Errorf("functions %v, want %v", built.Functions, want)
	}
	g := boot(t, k, []lab.File{{Name: "loop.ko", Source: k.Tree.ModuleFile("loop")}}, built)
	before := g.sh("cat /sys/kernel/irq/9/type; cat /sys/class/net/lo/type")
	g.load(built)
	if got := g.sh("ls /sys/kernel/livepatch/klatch_4/vmlinux | grep type_show"); got != "type_show,"+m[1] {
		t.Errorf("the kernel says %q", got)
	}
	_, lo, _ := strings.Cut(before, "\n")
	if got := g.sh("cat /sys/kernel/irq/9/type; cat /sys/class/net/lo/type"); got != "klatch\n"+lo {
		t.Errorf("got %q, before %q", got, before)
	}
	g.sh("insmod /lab/loop.ko")
	if got := g.sh("cat /sys/kernel/livepatch/klatch_4/loop/patched"); got != "1" {
		t.Errorf("the module that was loaded later: patched %q", got)
	}
	g.sh("dd if=/dev/zero of=/tmp/disk bs=1024 count=64 2>/dev/null && losetup -o 512 /dev/loop0 /tmp/disk")
	if got := g.sh("cat /sys/block/loop0/loop/offset"); got != "klatch" {
		t.Errorf("the module's function: %q", got)
	}
	g.disable(built)
	if got := g.sh("cat /sys/block/loop0/loop/offset"); got != "512" {
		t.Errorf("after disable: %q", got)
	}
}

func TestRefusesWhatCannotBeTraced(t *testing.T) {
	k := kerneltest.Prepared(t)
	h := handwritten(t,
		change{tomlName, `name = "cmdline_proc_show"`, `name = "native_sched_clock"`},
		change{tomlName, showFile, "arch/x86/kernel/tsc.c"},
		change{codeName, `"cmdline_proc_show"`, `"native_sched_clock"`},
		change{codeName, "static int counts_reads_show(struct seq_file *m, void *v)", "static struct seq_file *m;\nstatic u64 counts_reads_show(void)"})
	res := buildAny(t, &source.Driver{Cache: k.Cache}, plan(k, h), 5)
	if res.Result != build.Refused || len(res.Refusals) != 1 || res.Refusals[0].Code != "not_traceable" || res.Refusals[0].Function != "native_sched_clock" {
		t.Errorf("result %s, refusals %+v, error %q", res.Result, res.Refusals, res.Error)
	}
}
