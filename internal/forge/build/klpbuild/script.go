// SPDX-License-Identifier: Apache-2.0

package klpbuild

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/delta"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
)

// noChanges is what klp-build says when both builds are the same.
const noChanges = "no changes detected"

// klpBuild runs the script from the patched build on. Our information goes
// into the module by way of the script's own init.c, which becomes a part of
// every module: below the scratch folder it ends with our lines.
func (j *job) klpBuild(ctx context.Context) error {
	done := j.clock.Step("klp_build", "build patched, compare and link (klp-build)")
	patch := filepath.Join(j.folder, "queue.patch")
	if err := os.WriteFile(patch, j.diff, 0o644); err != nil { //nolint:forbidigo // scratch
		return err
	}
	name := j.plan.Sequence.ModuleName()
	for _, c := range []sandbox.Command{
		{Argv: []string{"tee", "-a", "scripts/livepatch/init.c"}, Stdin: strings.NewReader(j.info())},
		{Argv: []string{filepath.Join(j.tree.Source(), script), "-S", "2", "-T", "-o", name + ".ko", patch}},
	} {
		res, err := j.run(ctx, j.scratch, c)
		if err != nil {
			return err
		}
		j.said, j.exit = res.Output, res.Exit
	}
	done("")
	return nil
}

// info is what a livepatch says of itself: the vulnerabilities that it fixes,
// the kernel build that it is for, and its place in the order.
func (j *job) info() string {
	return fmt.Sprintf("\nMODULE_INFO(klatch_fixes, %q);\nMODULE_INFO(klatch_build_id, %q);\nMODULE_INFO(klatch_sequence, \"%d\");\n",
		j.fixes(), j.plan.Kernel.BuildID, j.plan.Sequence)
}

func (j *job) fixes() string {
	var ids []string
	for _, id := range j.plan.Fixes() {
		ids = append(ids, string(id))
	}
	return strings.Join(ids, ",")
}

// object is one object file that the fix changed.
type object struct {
	unit      kerneltree.Unit
	functions []string // whose code differs
	original  string   // file
}

// compare finds what the fix changes besides functions, from the object files
// that klp-build compiled again, whatever it said then: its words are for its
// authors, and it takes changes of boot code that would not load.
func (j *job) compare(context.Context) error {
	done := j.clock.Step("compare", "compare both builds")
	for _, u := range j.units.Units {
		after, before := upper(j.scratch, u.Target), filepath.Join(j.tree.Source(), u.Target)
		if filepath.Ext(u.Source) != ".c" || u.Source == counter || !regular(after) || !regular(before) {
			continue
		}
		a, err := read(before)
		if err != nil {
			return err
		}
		b, err := read(after)
		if err != nil {
			return err
		}
		if bytes.Equal(a, b) {
			continue
		}
		d, err := delta.Compare(a, b)
		if err != nil {
			return fmt.Errorf("compare %s: %w", u.Target, err)
		}
		if d.Empty() {
			continue
		}
		j.reached = append(j.reached, object{u, slices.Concat(d.Functions, d.New), before})
		for _, c := range d.Stopping {
			r := build.Refuse(fault.Code(c.Kind), u.Source)
			r.Function, r.Section, r.Detail = c.Name, c.Section, c.Why
			j.refuse(r)
		}
		for _, f := range d.Frames {
			if f.New-f.Old >= largeFrame {
				r := build.Refuse("stack_grown", u.Source)
				r.Function, r.Detail = f.Function, fmt.Sprintf("%d bytes, before %d", f.New, f.Old)
				j.warn(r)
			}
		}
	}
	done(fmt.Sprintf("%d object file(s) changed", len(j.reached)))
	return nil
}

// counter holds the number of the build, which grows with each link of vmlinux
// (scripts/link-vmlinux.sh); klp-build looks at vmlinux.o, which is without it.
const counter = "init/version-timestamp.c"

// largeFrame is a growth of the stack that a reviewer must see, in bytes; the
// kernel warns at 2048 for one frame (CONFIG_FRAME_WARN).
const largeFrame = 256

// complaints maps what klp-build, make and objtool say to refusals. Texts are
// those of Linux 7.2 and 7.3 (scripts/livepatch/klp-build, tools/objtool/
// klp-diff.c). The first group is the file, the second the function.
var complaints = []struct {
	text *regexp.Regexp
	code fault.Code
}{
	{regexp.MustCompile(`(?m)^(\S+?\.[ch]):\d+:\d+: (?:fatal )?error: ()`), "does_not_compile"},
	{regexp.MustCompile("undefined reference to ()`([^']+)'"), "symbol_missing"},
	{regexp.MustCompile(`()(\S+)\+0x[0-9a-f]+: unsupported static branch key`), "static_key"},
	{regexp.MustCompile(`()(\S+)\(\)\+0x[0-9a-f]+: unsupported static call key`), "static_call"},
	{regexp.MustCompile(`()(\S+): new reference to \S+ \(exported by \S+\) would create an undeclared module dependency`), "needs_module"},
	{regexp.MustCompile(`changed data: ()(\S+)`), "data_changed"},
	{regexp.MustCompile(`unsupported patch to (\S+)()`), "lib_code"},
	{regexp.MustCompile(noChanges + `()()`), "nothing_changed"},
	{regexp.MustCompile(`objtool klp (?:diff|checksum|post-link) failed()()`), "differ_refused"},
}

// judge reads how klp-build ended. What no rule explains is the builder's
// fault.
func (j *job) judge(context.Context) error {
	if j.exit == 0 {
		return j.take()
	}
	for _, c := range complaints {
		m := c.text.FindSubmatch(j.said)
		if m == nil {
			continue
		}
		file := string(m[1])
		if file == "" {
			file = strings.Join(j.plan.Files(), ", ")
		}
		r := build.Refuse(c.code, file)
		r.Function, r.Detail = string(m[2]), complaint(j.said)
		j.refuse(r)
		return nil
	}
	return fault.New(fault.Internal, "klp_build", "klp-build ended with status %d: %s", j.exit, complaint(j.said))
}

// complaint takes the lines that say why out of a log, else its end.
func complaint(log []byte) string {
	var out []string
	for line := range strings.Lines(string(log)) {
		line = strings.TrimSpace(line)
		if len(out) < 20 && (strings.Contains(line, "error:") || strings.Contains(line, "undefined reference") ||
			strings.HasPrefix(line, "error") || strings.Contains(line, "not found")) {
			out = append(out, line)
		}
	}
	if len(out) == 0 {
		return shorten(log)
	}
	return strings.Join(out, "\n")
}

// take reads the module that klp-build made.
func (j *job) take() error {
	var err error
	if j.module, err = read(upper(j.scratch, j.plan.Sequence.ModuleName()+".ko")); err != nil {
		return fault.New(fault.Internal, "klp_build", "klp-build left no module: %w", err)
	}
	if j.patch, err = readLivepatch(j.module); err != nil {
		return err
	}
	if len(j.patch.replaced) == 0 {
		r := build.Refuse("nothing_replaced", strings.Join(j.plan.Files(), ", "))
		r.Detail = shorten(j.said)
		j.refuse(r)
	}
	return nil
}
