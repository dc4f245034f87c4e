// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// guest is a booted stock kernel with the modules, the probe and livepatches.
type guest struct {
	t *testing.T
	m lab.Machine
}

// boot starts the stock kernel; modules are the distribution's own.
func boot(t *testing.T, k kerneltest.Kernel, livepatches []build.Result, modules ...string) *guest {
	t.Helper()
	probe := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", probe, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	files := []lab.File{{Name: "probe", Source: probe, Mode: 0o755}}
	for _, m := range modules {
		files = append(files, lab.File{Name: m + ".ko", Source: k.Tree.ModuleFile(m)})
	}
	for _, b := range livepatches {
		files = append(files, lab.File{Name: filepath.Base(b.Module.Path), Source: b.Module.Path})
	}
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	m, err := rig.Boot(t.Context(), lab.Spec{Name: "running", Kernel: k.Tree.Image(), Files: files})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := m.Console()
			lines := strings.Split(text, "\n")
			t.Logf("console:\n%s", strings.Join(lines[max(0, len(lines)-80):], "\n"))
		}
		m.Close()
	})
	return &guest{t, m}
}

// sh runs a script in the guest; its errors are part of what it prints.
func (g *guest) sh(script string) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 2*time.Minute)
	defer cancel()
	res, err := g.m.Run(ctx, lab.Command{Argv: []string{"sh", "-c", script}})
	if err != nil {
		g.t.Fatalf("%s: %v", script, err)
	}
	return strings.TrimSpace(string(res.Stdout) + string(res.Stderr))
}

// want runs a script and compares.
func (g *guest) want(what, script, want string) {
	g.t.Helper()
	if got := g.sh(script); got != want {
		g.t.Errorf("%s: %s\nprinted %q\nwant    %q", what, script, got, want)
	}
}

// load inserts a livepatch and waits for the end of its transition.
func (g *guest) load(b build.Result) {
	g.t.Helper()
	name := b.Sequence.ModuleName()
	if out := g.sh("insmod /lab/" + name + ".ko"); out != "" {
		g.t.Fatalf("load %s: %s\n%s", name, out, g.sh("dmesg | tail -5"))
	}
	g.want("transition", "for i in $(seq 300); do read t < /sys/kernel/livepatch/"+name+"/transition; [ $t = 0 ] && break; usleep 100000; done; echo $t", "0")
}

// unload disables a livepatch and takes it out.
func (g *guest) unload(b build.Result) {
	g.t.Helper()
	name := b.Sequence.ModuleName()
	g.want("disable", "echo 0 > /sys/kernel/livepatch/"+name+"/enabled; for i in $(seq 300); do [ -d /sys/kernel/livepatch/"+name+" ] || break; usleep 100000; done; rmmod "+name, "")
}

// quiet says that the kernel complained of nothing.
func (g *guest) quiet() {
	g.t.Helper()
	text, err := g.m.Console()
	if err != nil {
		g.t.Fatal(err)
	}
	for _, x := range lab.ScanConsole(text) {
		g.t.Errorf("kernel: %s: %s", x.Kind, x.Title)
	}
}

// live is one edited file and what user space sees of it.
type live struct {
	file   string
	edit   func(string) string
	what   string
	script string
	before string
	after  string
	late   bool // of a module that is loaded after the livepatch
}

// body puts a text of ours at the start of a function.
func body(function, text string) func(string) string {
	nop := nopIn(function)
	return func(s string) string { return strings.Replace(nop(s), "\tasm volatile(\"nop\");\n", text, 1) }
}

func replace(from, to string) func(string) string {
	return func(s string) string { return strings.Replace(s, from, to, 1) }
}

func both(a, b func(string) string) func(string) string {
	return func(s string) string { return b(a(s)) }
}

// everything is one livepatch for vmlinux and modules.
var everything = []live{
	{"fs/proc/version.c", playground, "new code", "", "", "", false},
	{"fs/drop_caches.c", replace("\t\tif (!stfu) {", "\t\tpr_info(\"klatch: said to be quiet: %d\\n\", stfu);\n\t\tif (!stfu) {"),
		"a static local keeps its value", "", "", "", false},
	{"fs/proc/consoles.c", body("static void *c_start(", "\tif (*pos >= 0) {\n\t\tconsole_lock();\n\t\treturn NULL;\n\t}\n"),
		"the second of three functions of one name", "grep -c . /proc/consoles; grep -c '^processor' /proc/cpuinfo; grep -q name /proc/crypto && echo crypto", "1\n2\ncrypto", "0\n2\ncrypto", false},
	{"fs/namei.c", body("static int set_root(", "\tif (!strcmp(current->comm, \"klatch-root\"))\n\t\tpr_info(\"klatch: set_root\\n\");\n"),
		"a function whose place in the symbol table is not its place in memory",
		"dmesg -c > /dev/null; sh -c 'printf klatch-root > /proc/$$/comm; read a < /proc/uptime'; dmesg | grep -o 'klatch: set_root' | uniq", "", "klatch: set_root", false},
	{"net/ethernet/eth.c", replace("dev->tx_queue_len	= DEFAULT_TX_QUEUE_LEN;", "dev->tx_queue_len	= 4242;"),
		"an exported function, called by a module", "cat /sys/class/net/dummy0/tx_queue_len", "1000", "4242", true},
	{"kernel/sys.c", both(replace("info->procs = nr_threads;", "info->procs = nr_threads + 30000;"),
		body("SYSCALL_DEFINE1(umask,", "\tif (mask == 0111)\n\t\treturn -EDOM;\n")),
		"a function that the compiler renamed", "/lab/probe sysinfo", "false", "true", false},
	{"", nil, "a system call", "sh -c 'umask 0111; umask'", "0111", "0022", false},
	{"kernel/time/itimer.c", body("static int do_setitimer(", "\tif (value->it_value.tv_nsec == 4242000)\n\t\tvalue->it_value.tv_sec = 7777;\n"),
		"a tracepoint in the new code", "echo > /sys/kernel/tracing/trace; /lab/probe itimer; grep -o 'it_value=[0-9]*' /sys/kernel/tracing/trace", "ok\nit_value=3600", "ok\nit_value=7777", false},
	{"include/linux/virtio_net.h", body("static inline int virtio_net_hdr_to_skb(", "\tif (hdr->gso_type == 0x55)\n\t\treturn 0;\n"),
		"an inline function that the compiler did not inline, in vmlinux", "/lab/probe packet", "errno 22", "70", false},
	{"", nil, "the same in a module", "/lab/probe tun", "errno 22", "70", false},
	{"drivers/block/loop.c", body("static long loop_control_ioctl(", "\tif (cmd == 0x4c7f)\n\t\treturn -EDOM;\n"),
		"a function of a module", "/lab/probe loop", "errno 38", "errno 33", false},
	{"drivers/net/dummy.c", replace("\tdev->min_mtu = 0;\n", "\tdev->min_mtu = 0;\n\tdev->mtu = 1400;\n"),
		"a function of a module that comes later", "cat /sys/class/net/dummy0/mtu", "1500", "1400", true},
}

// playground makes a new function in fs/proc/version.c that uses what kernel
// code is made of. It prints one line for each.
func playground(s string) string {
	s = strings.Replace(s, "#include <linux/fs.h>\n", `#include <linux/fs.h>
#include <linux/filter.h>
#include <linux/kernel_stat.h>
#include <linux/sched.h>
#include <linux/uaccess.h>
#include <asm/cpufeature.h>
`, 1)
	s = strings.Replace(s, "static int version_proc_show(", `
static int klatch_started = 41;
static const char *const klatch_words[] = {"alpha", "beta"};

static noinline int klatch_count(void)
{
	static int calls = 100;

	return ++calls;
}

static noinline void klatch_play(struct seq_file *m)
{
	unsigned long flags;
	int value = 0;

	seq_printf(m, "data %d\n", ++klatch_started);
	seq_printf(m, "words %s\n", klatch_words[klatch_started & 1]);
	seq_printf(m, "local %d\n", klatch_count());
	seq_printf(m, "get_user %d\n", get_user(value, (int __user *)8UL));
	if (static_branch_unlikely(&bpf_stats_enabled_key))
		seq_puts(m, "key on\n");
	else
		seq_puts(m, "key off\n");
	if (static_branch_likely(&bpf_stats_enabled_key))
		seq_puts(m, "key on\n");
	else
		seq_puts(m, "key off\n");
	seq_printf(m, "alternative %d\n", static_cpu_has(X86_FEATURE_SMAP) == boot_cpu_has(X86_FEATURE_SMAP));
	cond_resched();
	local_irq_save(flags);
	value = kstat_cpu_irqs_sum(0) + kstat_cpu_irqs_sum(1) > 0;
	local_irq_restore(flags);
	seq_printf(m, "per-cpu %d\n", value);
	printk(KERN_INFO "klatch: printk of %s\n", __FILE__);
	pr_debug("klatch: pr_debug of %s\n", __FILE__);
	WARN(!strcmp(current->comm, "klatch-warn"), "klatch was told to warn\n");
	if (!strcmp(current->comm, "klatch-bug"))
		BUG();
}

static int version_proc_show(`, 1)
	return strings.Replace(s, "\treturn 0;\n}", "\tklatch_play(m);\n\treturn 0;\n}", 1)
}

// TestEverythingInOneLivepatch: one livepatch for vmlinux and modules, through
// a header too, on the running stock kernel: tun and loop are loaded before it,
// dummy after it, and others that it holds never.
func TestEverythingInOneLivepatch(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	b := buildAll(t, k, everything)
	g := boot(t, k, []build.Result{b}, "tun", "loop", "dummy")
	g.sh("cd /lab; insmod ./tun.ko; insmod ./loop.ko; insmod ./dummy.ko; echo 1 > /sys/kernel/tracing/events/timer/itimer_state/enable; echo 4 > /proc/sys/vm/drop_caches")
	show := func(late bool, after bool) {
		t.Helper()
		for _, c := range everything {
			want := c.before
			if after {
				want = c.after
			}
			if c.late == late && c.script != "" {
				g.want(c.what, c.script, want)
			}
		}
	}
	show(false, false)
	show(true, false)
	g.sh("rmmod dummy")
	g.load(b)
	g.want("new code", "tail -n +2 /proc/version", played(42, "alpha", 101, "off"))
	g.want("new code with the key on", "sysctl -qw kernel.bpf_stats_enabled=1; tail -n +2 /proc/version; sysctl -qw kernel.bpf_stats_enabled=0", played(43, "beta", 102, "on"))
	g.want("new code with the key off again", "tail -n +2 /proc/version", played(44, "alpha", 103, "off"))
	g.want("the file's name in a string", "dmesg | grep -o 'klatch: printk.*' | uniq", "klatch: printk of fs/proc/version.c")
	g.want("a debug message", "echo 'file fs/proc/version.c +p' > /sys/kernel/debug/dynamic_debug/control; cat /proc/version > /dev/null; dmesg | grep -o 'klatch: pr_debug.*'", "klatch: pr_debug of fs/proc/version.c")
	g.want("a static local keeps its value", "dmesg -c > /dev/null; echo 1 > /proc/sys/vm/drop_caches; dmesg | grep -o 'klatch:.*quiet.*\\|drop_caches: 1'", "klatch: said to be quiet: 4")
	for _, f := range []string{"c_start,2", "set_root,1", "do_sysinfo.isra.0,1"} {
		g.want("position", "ls /sys/kernel/livepatch/klatch_1/vmlinux | grep -x "+f, f)
	}
	show(false, true)
	g.want("a module after the livepatch", "insmod /lab/dummy.ko", "")
	show(true, true)
	g.want("modules go and come again", "rmmod dummy; rmmod loop; insmod /lab/loop.ko; insmod /lab/dummy.ko", "")
	show(true, true)
	show(false, true)
	g.want("and once more", "rmmod dummy; rmmod loop; insmod /lab/loop.ko; insmod /lab/dummy.ko", "")
	show(true, true)
	show(false, true)
	g.quiet()
	g.unload(b)
	show(false, false)
	g.quiet()
	g.load(b)
	show(false, true)
	g.quiet()
	g.want("a warning", "sh -c 'printf klatch-warn > /proc/$$/comm; read a < /proc/version'; dmesg | grep -o 'WARNING: .* at fs/proc/version.c:[0-9]* klatch_play' | sed 's/CPU.* at/at/; s/:[0-9][0-9]* / /'",
		"WARNING: at fs/proc/version.c klatch_play")
	g.want("the end", "sh -c 'printf klatch-bug > /proc/$$/comm; read a < /proc/version' 2> /dev/null; dmesg | grep -o 'kernel BUG at fs/proc/version.c'",
		"kernel BUG at fs/proc/version.c")
}

// played is what the playground prints.
func played(data int, word string, local int, key string) string {
	return fmt.Sprintf("data %d\nwords %s\nlocal %d\nget_user -14\nkey %s\nkey %s\nalternative 1\nper-cpu 1", data, word, local, key, key)
}

// buildAll builds the changes into one livepatch.
func buildAll(t *testing.T, k kerneltest.Kernel, changes []live) build.Result {
	t.Helper()
	ps := patchesOf(t, k, changes)
	start := time.Now()
	res, _ := run(t, k, k.Cache, ps...)
	if res.Result != build.Built {
		t.Fatalf("result %s: %+v", res.Result, res.Refusals)
	}
	t.Logf("built in %.1f s: %v", time.Since(start).Seconds(), res.Functions)
	private := 0
	for _, w := range res.Warnings {
		if w.Code == "callers_replaced" && w.Function == "virtio_net_hdr_to_skb.constprop.0" {
			private++
		}
		t.Logf("warning %s %s %s: %s", w.Code, w.File, w.Function, w.Detail)
	}
	if private < 2 { // of vmlinux and of a module
		t.Errorf("%d functions became private copies", private)
	}
	return res
}

func patchesOf(t *testing.T, k kerneltest.Kernel, changes []live) []queue.Patch {
	t.Helper()
	var ps []queue.Patch
	for i, c := range changes {
		if c.file == "" {
			continue
		}
		p := edit(t, k, c.file, c.edit)
		p.Name = fmt.Sprintf("edit-%d", i)
		ps = append(ps, p)
	}
	return ps
}
