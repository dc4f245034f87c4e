// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build/module"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// moduleDir is the folder of the external module in the tree.
const moduleDir = module.Folder

// link makes the module: the differ's outputs, kpatch's livepatch hook with
// replace set, and our information.
func (j *job) link(ctx context.Context) error {
	done := j.clock.Step("link", "link the livepatch")
	name := j.plan.Sequence.ModuleName()
	if err := j.fillModuleDir(ctx, name); err != nil {
		return err
	}
	res, err := j.make(ctx, "M="+moduleDir, "KCFLAGS=-g0 -I"+moduleDir, "modules")
	if err != nil {
		return err
	}
	if res.Exit != 0 {
		return fault.New(fault.Internal, "link", "link module %s: %s", name, strings.Join(complaintsOf(res.Output), "\n"))
	}
	built := filepath.Join(moduleDir, name+".ko")
	for _, argv := range [][]string{
		{"strip", "--strip-debug", built},
		{j.Tools.program("create-klp-module"), "--no-klp-arch-sections", built, built + ".klp"},
	} {
		res, err := j.run(ctx, sandbox.Command{Argv: argv})
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			return fault.New(fault.Internal, "link", "%s %s: %s", filepath.Base(argv[0]), name, shorten(res.Output))
		}
	}
	ko, err := durable.ReadFile(j.upper(built+".klp"), livepatch.MaxModule)
	if err != nil {
		return err
	}
	if err := j.inspect(ko, name); err != nil || len(j.result.Refusals) > 0 {
		return err
	}
	if j.result.Module, err = module.Keep(ko, j.plan, j.dir); err != nil {
		return err
	}
	done(fmt.Sprintf("%s.ko, %d KiB", name, len(ko)/1024))
	return nil
}

// fillModuleDir puts the parts of the module into the tree, below the scratch
// folder. The build user does it: the scratch folder is its own, and root
// would follow the links that a bad build left there.
func (j *job) fillModuleDir(ctx context.Context, name string) error {
	parts := map[string][]byte{module.GlueName: module.Glue, ".output.o.cmd": nil}
	glue := module.GlueObject
	if modules := j.modules(); len(modules) > 0 {
		var list bytes.Buffer
		for _, m := range modules {
			fmt.Fprintf(&list, "KLATCH_MODULE(%s)\n", m)
		}
		parts[module.ForgetName], parts["klatch-modules.h"] = module.Forget, list.Bytes()
		glue += " " + module.ForgetObject
	}
	for _, t := range []string{"kpatch.h", "kpatch-patch.h", "kpatch-macros.h", "kpatch-syscall.h", "kpatch-patch-hook.c",
		"livepatch-patch-hook.c", "patch-hook.c", "kpatch.lds.S"} {
		b, err := durable.ReadFile(j.Tools.template(t), 1<<20)
		if err != nil {
			return err
		}
		parts[t] = b
	}
	parts["Makefile"] = fmt.Appendf(nil, `# SPDX-License-Identifier: GPL-2.0-only
obj-m += %[1]s.o
ldflags-y += -T $(src)/kpatch.lds
targets += kpatch.lds
%[1]s-objs += patch-hook.o %[4]s output.o
$(obj)/%[1]s.o: $(src)/kpatch.lds
ccflags-y += -DKLP_REPLACE_ENABLE=true
CFLAGS_%[2]s += %[3]s
`, name, module.GlueObject, module.GlueFlags(j.plan), glue)
	packed, err := module.Pack(parts)
	if err != nil {
		return err
	}
	ld := []string{"ld", "-r", "-o", filepath.Join(moduleDir, "output.o")}
	for _, o := range j.objects {
		if !o.same {
			ld = append(ld, j.placedFile(o))
		}
	}
	for _, c := range []sandbox.Command{
		{Argv: []string{"tar", "-x", "-f", "-", "--no-same-owner"}, Stdin: bytes.NewReader(packed)},
		{Argv: ld},
	} {
		res, err := j.run(ctx, c)
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			return fault.New(fault.Internal, "link", "%s the parts of the module: %s", c.Argv[0], shorten(res.Output))
		}
	}
	return nil
}

// modules lists the modules that the livepatch reaches, sorted.
func (j *job) modules() []string {
	var out []string
	for _, o := range j.objects {
		if !o.same && o.unit.Object != vmlinux {
			out = append(out, o.unit.Object)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// inspect checks the finished module before anybody signs it: what was proved
// must be what was linked.
func (j *job) inspect(ko []byte, name string) error {
	refusals, err := module.Inspect(ko, j.plan)
	if err != nil {
		return err
	}
	j.result.Refusals = append(j.result.Refusals, refusals...)
	names, err := replacedFunctions(ko)
	if err != nil {
		return err
	}
	var have, want []string
	for _, f := range names {
		have = append(have, f.String())
	}
	for _, p := range j.result.Match.Replaced {
		want = append(want, replaced{livepatch.Function{Object: p.Object, Name: p.Function}, p.Position}.String())
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return fault.New(fault.Internal, "bad_module", "module %s replaces %q, proved were %q", name, have, want)
	}
	return nil
}
