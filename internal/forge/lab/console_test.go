// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
)

var update = flag.Bool("update", false, "write what the detector finds beside the corpus")

// The corpus are consoles of real lab machines (see lab/README.md), each
// with what must be found in it, one line of kind and title.
func TestCorpus(t *testing.T) {
	logs, err := filepath.Glob("testdata/console/*.log")
	if err != nil || len(logs) == 0 {
		t.Fatalf("no corpus: %v", err)
	}
	for _, path := range logs {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".log"), func(t *testing.T) {
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for _, tr := range lab.ScanConsole(lab.CleanConsole(raw)) {
				fmt.Fprintf(&got, "%s\t%s\n", tr.Kind, tr.Title)
				if !strings.HasPrefix(tr.Report, tr.Title) && !strings.Contains(tr.Report, tr.Title) {
					t.Errorf("report of line %d does not hold its title %q", tr.Line, tr.Title)
				}
			}
			golden := strings.TrimSuffix(path, ".log") + ".want"
			if *update {
				if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != string(want) {
				t.Errorf("found:\n%swant:\n%s", got.String(), want)
			}
			if clean := strings.HasPrefix(filepath.Base(path), "clean-"); clean != (got.Len() == 0) {
				t.Errorf("clean by name: %v, found:\n%s", clean, got.String())
			}
		})
	}
}

// Lines that the stock kernels cannot produce, from the kernel's source and
// documentation, and lines that look like trouble and are none.
var singleLines = map[string]lab.TroubleKind{
	"BUG: KASAN: slab-out-of-bounds in foo+0x1/0x2 [bar]":                       lab.Sanitizer,
	"BUG: KFENCE: use-after-free read in foo+0x1/0x2":                           lab.Sanitizer,
	"UBSAN: shift-out-of-bounds in fs/x.c:12:3":                                 lab.Sanitizer,
	"kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)":   lab.Sanitizer,
	"WARNING: possible circular locking dependency detected":                    lab.Lockdep,
	"WARNING: suspicious RCU usage":                                             lab.Lockdep,
	"INFO: trying to register non-static key.":                                  lab.Lockdep,
	"BUG: sleeping function called from invalid context at mm/slab.h:274":       lab.Atomic,
	"rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }": lab.Stall,
	"watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [insmod:77]":             lab.Stall,
	"Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b":   lab.Panic,
	"livepatch: symbol 'x' not found in symbol table":                           lab.Livepatch,
	"livepatch: forcing remaining tasks to the patched state":                   lab.Livepatch,
	"livepatch: a sentence that no kernel says today":                           lab.Livepatch,
	"klatch_1: disagrees about version of symbol module_layout":                 lab.Module,
	"klatch_1: Unknown symbol foo (err -2)":                                     lab.Module,
	"EXT4-fs error (device nvme0n1): ext4_lookup:1785: inode #2: comm ls":       lab.Storage,
	"traps: cat[81] general protection fault ip:401000 sp:7ffe error:0 in cat":  lab.UserCrash,
	"general protection fault, probably for non-canonical address 0xdead":       lab.Oops,

	"WARNING: kernel/sched/core.c:123 at foo+0x1/0x2, CPU#1: insmod/94":                                  lab.Warning, // since Linux 6.19
	"BUG kmalloc-64 (Tainted: G           OE K   ): Redzone overwritten":                                 lab.Oops,
	"softirq: huh, entered softirq 3 NET_RX 00000000 with preempt_count 00000101, exited with 00000102?": lab.Atomic,
	"bad: scheduling from the idle thread!":                                                              lab.Atomic,
	"sysfs: cannot create duplicate filename '/class/net/x'":                                             lab.Warning,
	"kobject (00000000): tried to init an initialized object, something is seriously wrong.":             lab.Warning,
	"unregister_netdevice: waiting for lo to become free. Usage count = 2":                               lab.Warning,
	"VFS: Busy inodes after unmount of tmpfs. Self-destruct in 5 seconds.  Have a nice day...":           lab.Warning,
	"IPv4: Attempt to release alive inet socket 00000000":                                                lab.Warning,
	"Call Trace:": lab.Warning,

	"livepatch: enabling patch 'klatch_1'":                                                          "",
	"livepatch: 'klatch_1': starting patching transition":                                           "",
	"livepatch: 'klatch_1': completing unpatching transition":                                       "",
	"livepatch: 'klatch_1': canceling patching transition, going to unpatch":                        "",
	"livepatch: applying patch 'klatch_1' to loading module 'loop'":                                 "",
	"livepatch: signaling remaining tasks":                                                          "",
	"klatch_1: tainting kernel with TAINT_LIVEPATCH":                                                "",
	"klatch_1: loading out-of-tree module taints kernel.":                                           "",
	"klatch_1: module verification failed: signature and/or required key missing - tainting kernel": "",
	"sysrq: Show Blocked State":                                                                     "",
	"rcu: Hierarchical RCU implementation.":                                                         "",
	"kvm: exiting hardware virtualization":                                                          "",
	"EXT4-fs (nvme0n1): mounted filesystem with ordered data mode. Quota mode: none.":               "",
	"x86/mm: Checked W+X mappings: passed, no W+X pages found.":                                     "",
	"Debug warning: no BUG: here":                                                                   "",
}

func TestSingleLines(t *testing.T) {
	for line, want := range singleLines {

		got := lab.TroubleKind("")
		if found := lab.ScanConsole("[   12.345678] " + line + "\n"); len(found) > 0 {
			got = found[0].Kind
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}

func TestOnlyTheKernelIsHeard(t *testing.T) {
	for name, text := range map[string]string{
		"a program's line":                       "BUG: my program prints this\n",
		"a status line":                          "[  OK  ] BUG: Reached target\n",
		"a time of another form":                 "it was [12.34] BUG: when it stopped\n",
		"a sentence of the kernel about another": "[   12.345678] audit: said=\"[   11.345678] BUG: x\"\n",
	} {
		if found := lab.ScanConsole(text); len(found) > 0 {
			t.Errorf("%s: %+v", name, found)
		}
	}
	for name, text := range map[string]string{
		"with a caller": "[   12.345678][  T123] BUG: unable to handle page fault for address: 8\n",
		"with a level":  "<1>[   12.345678] BUG: unable to handle page fault for address: 8\n",
		"at a prompt":   "lab login: [   12.345678] BUG: unable to handle page fault for address: 8\n",
		"after noise":   lab.CleanConsole([]byte("\xff\x1b[   12.345678] BUG: unable to handle page fault for address: 8\n")),
		"colored":       lab.CleanConsole([]byte("\x1b[0;31m[   12.345678] BUG: unable to handle\x1b[0m\r\n")),
		"without end":   "[   12.345678] Kernel panic - not syncing: x",
	} {
		if found := lab.ScanConsole(text); len(found) != 1 {
			t.Errorf("%s: %+v", name, found)
		}
	}
}

func TestJudge(t *testing.T) {
	const oops = "[    1.000000] BUG: kernel NULL pointer dereference, address: 0000000000000008\n"
	int3 := func(before string) string {
		return "[    1.000000] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\n[    1.000001] RIP: 0010:force_qs_rnp+0x109/0x300\n" +
			"[    1.000002] Code: " + before + "<d3> 15 b5 00 4c\n[    1.000003] Kernel panic - not syncing: Fatal exception in interrupt\n"
	}
	broken := lab.Brokenf(errors.New("cable cut"), "run on m1")
	for name, tt := range map[string]struct {
		err     error
		console string
		want    lab.Verdict
	}{
		"nothing wrong":                            {nil, "", lab.Pass},
		"a check that did not hold":                {lab.Failf("still 5"), "", lab.Fail},
		"the lab's fault":                          {broken, "", lab.Broken},
		"a fault nobody knows":                     {errors.New("odd"), "", lab.Broken},
		"a restart without a word":                 {lab.ErrGuestRebooted, "", lab.Broken},
		"a restart after an oops":                  {lab.ErrGuestRebooted, oops, lab.Fail},
		"an oops that nobody noticed":              {nil, oops, lab.Fail},
		"silence after an oops":                    {broken, oops, lab.Fail},
		"a breakpoint that is in memory":           {nil, int3("01 00 cc "), lab.Fail},
		"a breakpoint that is not in memory":       {lab.ErrGuestRebooted, int3("01 00 e8 "), lab.Broken},
		"a breakpoint, and nobody knows where":     {nil, int3(""), lab.Fail},
		"an oops, then a breakpoint from nowhere":  {nil, oops + "[    1.000000] </TASK>\n" + int3("01 00 e8 "), lab.Fail},
		"a failed check on a broken lab is broken": {errors.Join(lab.Failf("no answer"), broken), "", lab.Broken},
		"a broken error stays broken when wrapped": {fmt.Errorf("scenario idle: %w", broken), "", lab.Broken},
		"a restart stays undecided when wrapped":   {lab.Brokenf(lab.ErrGuestRebooted, "run"), "", lab.Broken},
	} {
		if got, _ := lab.Judge(tt.err, tt.console); got != tt.want {
			t.Errorf("%s: got %s, want %s", name, got, tt.want)
		}
	}
}
