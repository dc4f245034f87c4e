// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

func TestExplain(t *testing.T) {
	k := kerneltest.Prepared(t)
	d := &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}
	p := edit(t, k, eventfd, all(sub(eventfdRead, eventfdRead+"	barrier();\n	asm volatile(\"nop\");\n"),
		nopIn("static void eventfd_free_ctx("), end("static inline int klatch_unused(void) { return 1; }\n")))
	p.Name, p.Fixes = "fix", []cve.ID{"CVE-2000-0001"}
	plan, err := compose.New(k.Entry, []queue.Patch{p}, k.Tools.Version(), 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, function string
		in             bool
		why            string
		inlines        string
	}{
		{"changed itself", "eventfd_ctx_do_read", true, "its own source changes", ""},
		{"it inlines a changed one", "eventfd_read", true, "eventfd_ctx_do_read is compiled into it, whose source changes", "eventfd_ctx_do_read"},
		{"untouched", "eventfd_poll", false, "its object code is the same before and after", ""},
		{"compiled into others only", "eventfd_free_ctx", false, "it has no code of its own: it is compiled into ", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, err := d.Explain(t.Context(), plan, c.function, build.NewClock(nil))
			if err != nil {
				t.Fatal(err)
			}
			if e.Result != build.Built || e.InLivepatch != c.in || !slices.ContainsFunc(e.Why, func(w string) bool { return strings.HasPrefix(w, c.why) }) {
				t.Errorf("explanation %+v, want %v because %q", e, c.in, c.why)
			}
			if c.in {
				if len(e.Proof) != 1 || e.Proof[0].Bytes == 0 || len(e.Hunks) == 0 || !strings.Contains(e.Hunks[0].Text, "+	asm volatile") {
					t.Errorf("proof %+v, hunks %+v", e.Proof, e.Hunks)
				}
				if len(e.Code) == 0 || !slices.Contains(e.Code[0].Assembly, "+ nop") || e.Code[0].New <= e.Code[0].Old {
					t.Errorf("code %+v", e.Code)
				}
			}
			if c.inlines != "" && !slices.Contains(e.Code[0].Inlines, c.inlines) {
				t.Errorf("inlines %q", e.Code[0].Inlines)
			}
			t.Logf("%+v", e)
		})
	}
	if _, err := d.Explain(t.Context(), plan, "no_such_function", build.NewClock(nil)); fault.KindOf(err) != fault.NotFound {
		t.Errorf("error %v", err)
	}
}

// TestComposition: two source patches of one function are merged in the
// queue's order; where the second does not fit, the first is named; without
// one of them the next build has the next sequence.
func TestComposition(t *testing.T) {
	k := kerneltest.Prepared(t)
	named := func(name string, p queue.Patch) queue.Patch { p.Name = name; return p }
	first := named("first", edit(t, k, eventfd, sub("	if (count < sizeof(ucnt))\n", "	if (count < sizeof(ucnt) || ctx->id == 4711)\n")))
	second := named("second", edit(t, k, eventfd, sub("		res = sizeof(ucnt);\n", "		res = sizeof(ucnt) + (ctx->id == 4712);\n")))
	clash := named("clash", edit(t, k, eventfd, sub("	if (count < sizeof(ucnt))\n", "	if (count < 2 * sizeof(ucnt))\n")))

	both, data := run(t, k, k.Cache, first, second)
	if both.Result != build.Built || !slices.ContainsFunc(both.Warnings, func(w build.Refusal) bool {
		return w.Code == "merged" && w.Function == "eventfd_write" && w.Detail == "first and second"
	}) {
		t.Fatalf("%s, warnings %+v, refusals %+v", both.Result, both.Warnings, both.Refusals)
	}
	stopped, _ := run(t, k, k.Cache, first, clash)
	if stopped.Result != build.Refused || stopped.Refusals[0].Code != "patch_does_not_apply" ||
		!strings.HasPrefix(stopped.Refusals[0].Detail, "in the way: first\n") || !strings.Contains(stopped.Refusals[0].Rule, "clash") {
		t.Errorf("%s: %+v", stopped.Result, stopped.Refusals)
	}

	done, err := build.Read(data, k.Entry.Release)
	if err != nil || len(done) != 1 {
		t.Fatalf("%d builds, %v", len(done), err)
	}
	plan, err := compose.New(k.Entry, []queue.Patch{second}, k.Tools.Version(), 0)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := plan.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if plan.Sequence = build.Next(done, digest); plan.Sequence != 2 {
		t.Fatalf("without the first patch the sequence is %d", plan.Sequence)
	}
	res, err := build.Run(t.Context(), &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}, plan, data, build.NewClock(nil))
	if err != nil || res.Result != build.Built || res.Sequence != 2 || len(res.Warnings) >= len(both.Warnings) {
		t.Errorf("%v, %s sequence %d, warnings %+v", err, res.Result, res.Sequence, res.Warnings)
	}
	if again := build.Next(append(done, res), digest); again != 2 {
		t.Errorf("the same queue again is %d", again)
	}
}
