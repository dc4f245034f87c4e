// SPDX-License-Identifier: Apache-2.0

//go:build vm

package source_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/buildtest"
	"klatch/internal/forge/build/source"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/kerneltest"
)

const (
	fixture  = "../../../../lab/livepatches/counts-reads"
	codeName = "counts_reads.c"
	tomlName = queue.DeclaredName
	showFile = "fs/proc/cmdline.c"
	showFunc = "cmdline_proc_show"
)

// change is one replacement of text in a file of the fixture; a text that is
// not there ends the test.
type change struct{ file, from, to string }

// handwritten is the fixture with changes.
func handwritten(t *testing.T, changes ...change) *queue.Handwritten {
	t.Helper()
	h, err := queue.ReadHandwritten(fixture)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range changes {
		done := false
		for i, f := range h.Files {
			if f.Name == c.file && strings.Contains(string(f.Content), c.from) {
				h.Files[i].Content = []byte(strings.ReplaceAll(string(f.Content), c.from, c.to))
				done = true
			}
		}
		if !done {
			t.Fatalf("%s has no %q", c.file, c.from)
		}
	}
	if h, err = queue.ParseHandwritten(h.Files); err != nil {
		t.Fatal(err)
	}
	return h
}

func plan(k kerneltest.Kernel, h *queue.Handwritten, patches ...queue.Patch) compose.Plan {
	return compose.NewHandwritten(k.Entry, h, patches, source.Version(), 7)
}

func TestConformance(t *testing.T) {
	k := kerneltest.Prepared(t)
	cache := kerneltest.OtherCache(t, k, nil)
	refused := func(name string, code fault.Code, function string, changes ...change) buildtest.Refused {
		return buildtest.Refused{Name: name, Code: code, Function: function, Plan: plan(k, handwritten(t, changes...))}
	}
	add := func(text string) change { return change{codeName, "MODULE_LICENSE", text + "\nMODULE_LICENSE"} }
	otherFlags := k
	otherFlags.Entry.ExtraCFlags = "-fno-omit-frame-pointer"
	buildtest.Run(t, buildtest.Subject{
		Builder: &source.Driver{Cache: cache},
		Elsewhere: func(t *testing.T) build.Builder {
			return &source.Driver{Cache: kerneltest.OtherCache(t, k, nil)}
		},
		Hasty:     &source.Driver{Cache: cache, Timeout: time.Millisecond},
		Good:      plan(k, handwritten(t)),
		Functions: []livepatch.Function{{Object: "vmlinux", Name: showFunc}},
		Other:     plan(k, handwritten(t, change{codeName, "klatch counts_reads", "klatch counts reads"})),
		Unbuilt:   plan(k, handwritten(t, change{tomlName, showFile, "net/appletalk/ddp.c"})),
		Scratch:   filepath.Join(cache, "builds"),
		Tree:      kerneltree.At(cache, k.Entry).Source(),
		Watched:   []string{showFile, ".config", "Module.symvers", "include/generated/autoconf.h"},
		Refused: []buildtest.Refused{
			{Name: "source patches beside it", Code: "mixed_queue", Plan: plan(k, handwritten(t), queue.Patch{Name: "x"})},
			{Name: "other flags than the kernel's", Code: "wrong_environment", Function: showFunc, Plan: plan(otherFlags, handwritten(t))},
			refused("source that does not compile", "does_not_compile", "", add("int x = y;")),
			refused("a module without a license", "does_not_compile", "", change{codeName, `MODULE_LICENSE("GPL");`, ""}),
			refused("a symbol that is not exported", "symbol_missing", "saved_command_line",
				change{codeName, "struct seq_file *m, void *v)\n{", "struct seq_file *m, void *v)\n{\n\textern char *saved_command_line;\n\tseq_puts(m, saved_command_line);"}),
			refused("a module of the kernel that it would need", "needs_module", "",
				add("#include <net/udp_tunnel.h>\nvoid *needs(void) { return &udp_sock_create4; }")),
			refused("no replace", "no_replace", "", change{codeName, ".replace = true", ".replace = false"}),
			refused("no word for the kernel that it is a livepatch", "module_shape", "", change{codeName, `MODULE_INFO(livepatch, "Y");`, ""}),
			refused("another function than declared", "not_declared", "cmdline_other", change{codeName, `"cmdline_proc_show"`, `"cmdline_other"`}),
			refused("another position than declared", "not_declared", showFunc, change{codeName, "{ .old_name", "{ .old_sympos = 2, .old_name"}),
			refused("a callback that is not declared", "not_declared", "", change{tomlName, `, "post_unpatch"`, ""}),
			refused("a callback that is not there", "not_declared", "", change{codeName, ", .post_unpatch = counts_reads_post_unpatch", ""}),
			refused("a shadow variable that is not declared", "not_declared", "", change{tomlName, "[[shadow]]\nid = 0x6b6c6301\nabout = \"how often /proc/cmdline was read; attached to init_task, which never goes away\"", ""}),
			refused("work in init", "module_shape", "", change{codeName, "return klp_enable_patch(&patch);", "pr_info(\"hello\\n\");\n\treturn klp_enable_patch(&patch);"}),
			refused("work in exit", "module_shape", "", change{codeName, "counts_reads_exit(void) { }", "counts_reads_exit(void) { klp_shadow_free_all(READS_ID, NULL); }"}),
			refused("no exit", "module_shape", "", change{codeName, "module_exit(counts_reads_exit);", ""}),
			refused("init that changes the tables", "module_shape", "", change{codeName, "return klp_enable_patch(&patch);", "patch.replace = false;\n\treturn klp_enable_patch(&patch);"}),
			refused("a callback that changes the tables", "module_shape", "", change{codeName, `pr_info("pre_patch ran\n");`, `funcs[0].old_sympos = 3;`}, change{codeName, "/* Zeroed", "static struct klp_func funcs[2];\n/* Zeroed"}),
			refused("another pointer to the tables", "module_shape", "", add("struct klp_func *leak = &funcs[0];")),
			refused("two livepatches", "module_shape", "", add("struct klp_patch second = { .mod = THIS_MODULE, .replace = true };")),
			refused("an exported function", "module_shape", "", add("void more(void); void more(void) { }\nEXPORT_SYMBOL_GPL(more);")),
			refused("a parameter", "module_shape", "", add("static int knob; module_param(knob, int, 0644);")),
			refused("a number as new function", "module_shape", "", change{codeName, ".new_func = counts_reads_show", ".new_func = (void *)8, .old_func = counts_reads_show"}),
			refused("a function that the kernel does not have", "no_such_function", "cmdline_other",
				change{codeName, `"cmdline_proc_show"`, `"cmdline_other"`}, change{tomlName, `name = "cmdline_proc_show"`, `name = "cmdline_other"`}),
			refused("a position that is not the function's", "no_such_function", showFunc,
				change{codeName, "{ .old_name", "{ .old_sympos = 2, .old_name"}, change{tomlName, `file =`, "position = 2\nfile ="}),
			refused("another prototype", "prototype_changed", showFunc, change{codeName, "struct seq_file *m, void *v", "struct seq_file *m, void *v, int more"}),
			refused("another type of a parameter", "prototype_changed", showFunc, change{codeName, "struct seq_file *m, void *v", "struct seq_file *m, long *v"}),
			refused("another result", "prototype_changed", showFunc, change{codeName, "static int counts_reads_show", "static long counts_reads_show"}),
			refused("a file that is not built beside one that is", "not_built", "atalk_release",
				change{tomlName, "[[callback]]", "[[function]]\nobject = \"vmlinux\"\nname = \"atalk_release\"\nfile = \"net/appletalk/ddp.c\"\n\n[[callback]]"}),
		},
	})
}
