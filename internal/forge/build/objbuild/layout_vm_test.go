// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// TestLayoutOfTypes changes types of the real tree, or nearly does.
func TestLayoutOfTypes(t *testing.T) {
	k := kerneltest.Prepared(t)
	const (
		list, clock, matrix, sched = "kernel/time/timer_list.c", "kernel/time/posix-clock.c", "kernel/irq/matrix.c", "kernel/time/tick-sched.h"

		second, start = "\tbool second_pass;\n", "\titer->second_pass = false;\n\treturn move_iter(iter, *offset);"
		device, desc  = "\tenum tick_device_mode mode;\n", "struct posix_clock_desc {\n"
	)
	nop := nopIn("static void timer_list_stop(")
	first := func(name string) func(string) string { // a new first member of posix_clock_desc, which all its functions feel
		return sub(desc, desc+"\tu64 "+name+";\n", "\tcd->fp = fp;\n", "\tcd->fp = fp;\n\tcd->"+name+" = id;\n")
	}
	for _, c := range []struct {
		name    string
		file    string
		change  func(string) string
		also    func(string) string // to list, so that it changes
		refused string              // type; empty: built
		detail  []string
		warning fault.Code
	}{
		{name: "a member of a header's struct, in a hole", file: sched, change: sub(device, device+"\tint klatch_extra;\n"),
			also: nop, refused: "struct tick_device", detail: []string{"member klatch_extra added: offset 12, size 4, in a hole"}},
		{name: "a member of a header's struct before others", file: sched, change: sub("struct tick_device {\n", "struct tick_device {\n\tvoid *klatch_extra;\n"),
			also: nop, refused: "struct tick_device", detail: []string{"member klatch_extra added: offset 0, size 8", "member mode moved: old offset 8, size 4; new offset 16, size 4", "total size: old 16, new 24"}},
		{name: "an enumerator of a header that makes others greater", file: sched, change: sub("\tNOHZ_MODE_LOWRES,", "\tNOHZ_MODE_KLATCH,\n\tNOHZ_MODE_LOWRES,"),
			refused: "enum tick_nohz_mode", detail: []string{"enumerator NOHZ_MODE_LOWRES: 2, before 1", "enumerator NOHZ_MODE_HIGHRES: 3, before 2"}},
		{name: "a member of a struct of a .c file, in a hole", file: list, change: sub(second, second+"\tbool klatch_extra;\n", start, "\titer->klatch_extra = true;\n"+start),
			refused: "struct timer_list_iter", detail: []string{"member klatch_extra added: offset 5, size 1, in a hole"}},
		{name: "a member with another size", file: list, change: sub("\tu64 now;\n};", "\tu32 now;\n};"),
			refused: "struct timer_list_iter", detail: []string{"member now resized: old offset 8, size 8; new offset 8, size 4", "total size: old 16, new 12"}},
		{name: "a macro that is the bound of an array", file: matrix, change: sub("(BITS_TO_LONGS(IRQ_MATRIX_BITS))", "(BITS_TO_LONGS(IRQ_MATRIX_BITS) + 1)"),
			refused: "struct cpumap", detail: []string{"member alloc_map resized"}},
		{name: "a struct of the stack that a static variable keeps too", file: clock,
			change:  all(first("klatch_id"), sub("static int get_clock_desc(", "static struct posix_clock_desc klatch_last;\n\nstatic int get_clock_desc(", "\tcd->clk = get", "\tklatch_last.fp = fp;\n\tcd->clk = get")),
			refused: "struct posix_clock_desc", detail: []string{"member klatch_id added: offset 0", "may outlive a call"}},
		{name: "near: a struct of the stack that grows at its end", file: clock,
			change: sub("\tstruct posix_clock *clk;\n};", "\tstruct posix_clock *clk;\n\tu8 klatch_id;\n};", "\tstruct posix_clock_desc cd;\n", "\tstruct posix_clock_desc cd;\n\tcd.klatch_id = 1;\n",
				"\tcd->fp = fp;\n", "\tcd->fp = fp;\n\tif (cd->klatch_id)\n\t\tpr_debug(\"klatch\");\n"),
			warning: "layout_local"}, // its size is in the frames: all functions change

		{name: "near: a struct of the stack of functions that are all replaced", file: clock, change: first("klatch_id"), warning: "layout_local"},
		{name: "near: a new struct and a new member of it", file: list, change: all(nop, sub("struct timer_list_iter {", "struct klatch_new {\n\tint a;\n\tstruct timer_list_iter *b;\n};\n\nstruct timer_list_iter {"))},
		{name: "near: a member under another name", file: list, change: all(nop, func(s string) string {
			return strings.ReplaceAll(strings.Replace(s, second, "\tbool klatch_pass;\n", 1), "->second_pass", "->klatch_pass")
		}), warning: "layout_meaning"},
		{name: "near: comments, declarations in another order, a new macro and a new prototype", file: list, change: all(nop,
			sub("struct timer_list_iter {\n\tint cpu;", "struct timer_list_iter {\n\tint cpu; /* the processor */", "struct timer_list_iter {", "#define KLATCH_NEW 3\nstatic void timer_list_stop(struct seq_file *s, void *value);\n\nstruct timer_list_iter {"))},
		{name: "near: a greater enumeration in a header with the same values", file: sched, change: sub("\tNOHZ_MODE_HIGHRES,\n", "\tNOHZ_MODE_HIGHRES,\n\tNOHZ_MODE_KLATCH,\n"), also: nop},
		{name: "near: a new struct and a new function in a header", file: sched, change: sub("struct tick_device {", "struct klatch_new {\n\tint a;\n};\n\nstatic inline int klatch_zero(struct klatch_new *k)\n{\n\treturn k->a;\n}\n\nstruct tick_device {"), also: nop},
	} {
		t.Run(c.name, func(t *testing.T) {
			patches := []queue.Patch{edit(t, k, c.file, c.change)}
			if c.also != nil {
				patches = append(patches, edit(t, k, list, c.also))
			}
			res, _ := run(t, k, k.Cache, patches...)
			t.Logf("%v", res.Seconds)
			var warnings []fault.Code
			for _, w := range res.Warnings {
				if strings.HasPrefix(string(w.Code), "layout_") {
					warnings = append(warnings, w.Code)
				}
			}
			if want := c.warning; len(warnings) > 1 || len(warnings) == 1 && warnings[0] != want || len(warnings) == 0 && want != "" {
				t.Errorf("warnings %+v, want %q", res.Warnings, want)
			}
			if c.refused == "" {
				if res.Result != build.Built {
					t.Errorf("%s: %+v", res.Result, res.Refusals)
				}
				return
			}
			if res.Result != build.Refused || len(res.Refusals) == 0 {
				t.Fatalf("result %s", res.Result)
			}
			r := res.Refusals[0]
			if r.Code != "layout_changed" || r.File != c.file || r.Type != c.refused || r.Function != "" || !strings.Contains(r.Hint, "klp_shadow_alloc") {
				t.Errorf("refusals %+v, want layout_changed for %s in %s", res.Refusals, c.refused, c.file)
			}
			for _, d := range c.detail {
				if !strings.Contains(r.Detail, d) {
					t.Errorf("detail %q lacks %q", r.Detail, d)
				}
			}
		})
	}
}
