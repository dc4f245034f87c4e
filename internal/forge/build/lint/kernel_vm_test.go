// SPDX-License-Identifier: Apache-2.0

//go:build vm

package lint_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build/lint"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit/kerneltest"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// change makes a source patch from the real tree, by replacing texts.
func change(t *testing.T, k kerneltest.Kernel, file string, pairs ...string) queue.Patch {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(k.Tree.Source(), file))
	if err != nil {
		t.Fatal(err)
	}
	s := string(b)
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(s, pairs[i]) {
			t.Fatalf("%s has no %q", file, pairs[i])
		}
		s = strings.Replace(s, pairs[i], pairs[i+1], 1)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(s), 0o644); err != nil {
		t.Fatal(err)
	}
	diff, err := queue.Change(t.Context(), k.Tree.Source(), dir, []string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return queue.Patch{Name: "p", Fixes: []cve.ID{"CVE-2000-0001"}, Diff: diff, Files: []string{file}}
}

const (
	eventfd = "fs/eventfd.c"
	release = "static int eventfd_release(struct inode *inode, struct file *file)\n{\n"
	nop     = "	asm volatile(\"nop\");\n"
)

func TestLintOfARealTree(t *testing.T) {
	k := kerneltest.Prepared(t)
	for _, c := range []struct {
		name string
		code fault.Code // empty: nothing is found
		how  lint.Certainty
		at   string // function or type
		p    queue.Patch
	}{
		{"a plain fix", "", "", "", change(t, k, eventfd, release, release+nop)},
		{"assembly", "assembly", lint.Sure, "", change(t, k, "arch/x86/lib/putuser.S", "#include <linux/linkage.h>\n", "#include <linux/linkage.h>\n/* more */\n")},
		{"the vDSO", "boot_image", lint.Sure, "", change(t, k, "lib/vdso/gettimeofday.c", "#include <vdso/datapage.h>\n", "#include <vdso/datapage.h>\n/* more */\n")},
		{"a makefile", "not_code", lint.Sure, "", change(t, k, "fs/Makefile", "obj-", "# more\nobj-")},
		{"not built", "", "", "", change(t, k, "net/appletalk/ddp.c", "static int atalk_release(struct socket *sock)\n{\n", "static int atalk_release(struct socket *sock)\n{\n"+nop)},
		{"boot code", "init_code", lint.Sure, "uts_ns_init", change(t, k, "kernel/utsname.c", "void __init uts_ns_init(void)\n{\n", "void __init uts_ns_init(void)\n{\n"+nop)},
		{"a comment in boot code", "", "", "", change(t, k, "kernel/utsname.c", "void __init uts_ns_init(void)\n{\n", "void __init uts_ns_init(void)\n{\n	/* more */\n")},
		{"notrace", "not_traceable", lint.Sure, "sched_clock_tick", change(t, k, "kernel/sched/clock.c", "notrace void sched_clock_tick(void)\n{\n", "notrace void sched_clock_tick(void)\n{\n"+nop)},
		{"a folder without tracing", "not_traceable", lint.Sure, "argv_free", change(t, k, "lib/argv_split.c", "void argv_free(char **argv)\n{\n", "void argv_free(char **argv)\n{\n"+nop)},
		{"a shared section", "not_patchable", lint.Sure, "down", change(t, k, "kernel/locking/semaphore.c", "void __sched down(struct semaphore *sem)\n{\n", "void __sched down(struct semaphore *sem)\n{\n"+nop)},
		{"a header of everybody", "header_fanout", lint.Sure, "", change(t, k, "include/linux/list.h", "	__list_add(new, head, head->next);\n", "	__list_add(new, head, READ_ONCE(head->next));\n")},
		{"members of a type", "layout_changed", lint.Probable, "struct eventfd_ctx", change(t, k, eventfd, "	unsigned int flags;\n	int id;\n", "	int id;\n	unsigned int flags;\n")},
		{"a table of functions", "ops_table_changed", lint.Probable, "eventfd_fops", change(t, k, eventfd, "	.llseek		= noop_llseek,\n", "")},
		{"initialized data", "data_changed", lint.Probable, "init_time_ns", change(t, k, "kernel/time/namespace.c", "REFCOUNT_INIT(3)", "REFCOUNT_INIT(4)")},
		{"an export that goes", "export_changed", lint.Sure, "eventfd_fget", change(t, k, eventfd, "EXPORT_SYMBOL_GPL(eventfd_fget);\n", "")},
		{"a prototype", "export_changed", lint.Sure, "eventfd_fget", change(t, k, eventfd, "struct file *eventfd_fget(int fd)", "struct file *eventfd_fget(long fd)")},
		{"another name of a parameter", "", "", "", change(t, k, eventfd, "struct file *eventfd_fget(int fd)\n", "struct file *eventfd_fget(const int number)\n")},
		{"a sleeper", "sleeps", lint.Look, "eventfd_write", change(t, k, eventfd, "	if (count < sizeof(ucnt))\n", "	if (count <= sizeof(ucnt))\n")},
	} {
		t.Run(c.name, func(t *testing.T) {
			start := time.Now()
			rep, err := lint.Run(t.Context(), k.Cache, k.Entry, []queue.Patch{c.p}, 400)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.2f s: %+v", time.Since(start).Seconds(), rep)
			if c.code == "" {
				if len(rep.Findings) != 0 {
					t.Errorf("findings %+v", rep.Findings)
				}
				return
			}
			if !slices.ContainsFunc(rep.Findings, func(f lint.Finding) bool {
				return f.Code == c.code && f.Certainty == c.how && (f.Function == c.at || f.Type == c.at)
			}) {
				t.Errorf("findings %+v, want %s %s at %s", rep.Findings, c.how, c.code, c.at)
			}
			if rep.Refused() != (c.how == lint.Sure) {
				t.Errorf("refused: %v", rep.Refused())
			}
		})
	}
}

// TestLintSeesPatchesInTheirOrder: a patch is looked at as the ones before it
// have left the source.
func TestLintSeesPatchesInTheirOrder(t *testing.T) {
	k := kerneltest.Prepared(t)
	first := change(t, k, eventfd, "	if (count < sizeof(ucnt))\n", "	if (count <= sizeof(ucnt))\n")
	second := change(t, k, eventfd, "	if (count < sizeof(ucnt))\n", "	if (count < 2 * sizeof(ucnt))\n")
	third := change(t, k, eventfd, "		res = sizeof(ucnt);\n", "		res = sizeof(ucnt) + 0;\n")
	first.Name, second.Name, third.Name = "first", "second", "third"
	rep, err := lint.Run(t.Context(), k.Cache, k.Entry, []queue.Patch{first, second, third}, 400)
	if err != nil {
		t.Fatal(err)
	}
	has := func(code fault.Code, patch, detail string) bool {
		return slices.ContainsFunc(rep.Findings, func(f lint.Finding) bool {
			return f.Code == code && f.Patch == patch && strings.HasPrefix(f.Detail, detail)
		})
	}
	if !has("patch_does_not_apply", "second", "in the way: first\n") || has("patch_does_not_apply", "third", "") || !has("merged", "", "first and ") {
		t.Errorf("findings %+v", rep.Findings)
	}
	if left, _ := filepath.Glob(filepath.Join(k.Cache, "builds", "lint-*")); len(left) != 0 {
		t.Errorf("scratch folders left: %v", left)
	}
}
