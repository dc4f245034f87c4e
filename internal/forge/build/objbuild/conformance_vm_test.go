// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/buildtest"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/kerneltest"
)

func TestConformance(t *testing.T) {
	k := kerneltest.Prepared(t)
	const file, unbuilt = "kernel/time/namespace.c", "net/appletalk/ddp.c"
	plan := func(p queue.Patch) compose.Plan {
		plan, err := compose.New(k.Entry, []queue.Patch{p}, k.Tools.Version(), 7)
		if err != nil {
			t.Fatal(err)
		}
		return plan
	}
	both := func(s string) string {
		return nopIn("int proc_timens_set_offset(")(nopIn("static struct ns_common *timens_get(")(s))
	}
	misfit := queue.Patch{Name: "misfit", Fixes: edit(t, k, file, both).Fixes, Files: []string{file},
		Diff: []byte("--- a/" + file + "\n+++ b/" + file + "\n@@ -10,3 +10,4 @@\n no such line\n+more\n nor this\n nor that\n")}
	cache := kerneltest.OtherCache(t, k, nil)
	buildtest.Run(t, buildtest.Subject{
		Builder: &objbuild.Driver{Cache: cache, Tools: k.Tools},
		Elsewhere: func(t *testing.T) build.Builder {
			return &objbuild.Driver{Cache: kerneltest.OtherCache(t, k, nil), Tools: k.Tools}
		},
		Hasty:     &objbuild.Driver{Cache: cache, Tools: k.Tools, Timeout: time.Millisecond},
		Good:      plan(edit(t, k, file, both)),
		Functions: []livepatch.Function{{Object: "vmlinux", Name: "proc_timens_set_offset"}, {Object: "vmlinux", Name: "timens_get"}},
		Other:     plan(edit(t, k, file, nopIn("static struct ns_common *timens_get("))),
		Unbuilt:   plan(edit(t, k, unbuilt, nopIn("static int atalk_release("))),
		Refused: []buildtest.Refused{
			{Name: "a patch for other source", Plan: plan(misfit), Code: "patch_does_not_apply"},
			{Name: "source that does not compile", Code: "does_not_compile",
				Plan: plan(edit(t, k, file, func(s string) string { return s + "int x = y;\n" }))},
			{Name: "only a comment", Code: "nothing_changed",
				Plan: plan(edit(t, k, file, func(s string) string { return s + "/* more */\n" }))},
			{Name: "a function that is not there", Code: "symbol_missing", Function: "no_such_function",
				Plan: plan(edit(t, k, file, func(s string) string {
					return strings.Replace(both(s), "nop", "call no_such_function", 1)
				}))},
		},
		Scratch: filepath.Join(cache, "builds"),
		Tree:    kerneltree.At(cache, k.Entry).Source(),
		Watched: []string{file, unbuilt, ".config", "Module.symvers", "include/generated/autoconf.h"},
	})
}
