// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/lab"
)

// maxModules bounds how many modules go into the guest.
const maxModules = 64

// reached lists the modules that the livepatch replaces functions of, and
// those that they need, in the order in which they load.
func (r *run) reached() ([]string, error) {
	var out []string
	var add func(m string) error
	add = func(m string) error {
		if slices.Contains(out, m) {
			return nil
		}
		if len(out) == maxModules {
			return fault.New(fault.Invalid, "too_many_modules", "the livepatch needs over %d modules in the lab", maxModules)
		}
		needs, err := dependsOn(r.Tables.Module(m))
		if err != nil {
			return fmt.Errorf("module %s: %w", m, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		out = append(out, m)
		return nil
	}
	if r.Tables.Module == nil {
		return nil, nil
	}
	for _, f := range r.Built.Functions {
		if f.Object == "vmlinux" {
			continue
		}
		if err := add(f.Object); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// dependsOn reads which modules a module needs.
func dependsOn(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	sec := f.Section(".modinfo")
	if sec == nil || sec.Size > 1<<20 {
		return nil, fault.New(fault.Invalid, "bad_module", "no usable .modinfo section")
	}
	data, err := sec.Data()
	if err != nil {
		return nil, err
	}
	for part := range bytes.SplitSeq(data, []byte{0}) {
		if list, ok := strings.CutPrefix(string(part), "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}

// loadModules loads what the livepatch reaches before it. A module that needs
// hardware stays out, and the result says so.
func (r *run) loadModules(ctx context.Context) error {
	var absent []string
	for _, m := range r.modules {
		// One whose need stayed out would only make the kernel complain.
		if r.Tables.Module != nil {
			needs, err := dependsOn(r.Tables.Module(m))
			if err != nil {
				return lab.Brokenf(err, "read what module %s needs", m)
			}
			if slices.ContainsFunc(needs, func(n string) bool { return slices.Contains(absent, n) }) {
				absent = append(absent, m)
				continue
			}
		}
		res, err := r.m.Run(ctx, lab.Command{Argv: []string{"insmod", lab.FilesDir + "/" + m + ".ko"}})
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			absent = append(absent, m)
			continue
		}
		r.present = append(r.present, m)
	}
	r.note = "loaded: " + strings.Join(r.present, ", ")
	if len(absent) > 0 {
		r.note += "; not loaded, perhaps for want of hardware: " + strings.Join(absent, ", ")
	}
	return nil
}

// modulesAgain takes the reached modules out and loads them again over the
// livepatch: it must apply to those that come later. One that is in use stays.
func (r *run) modulesAgain(ctx context.Context) error {
	var gone []string
	for _, m := range slices.Backward(r.present) {
		res, err := r.m.Run(ctx, lab.Command{Argv: []string{"rmmod", m}})
		if err != nil {
			return err
		}
		if res.Exit == 0 {
			gone = append(gone, m)
		}
	}
	for _, m := range slices.Backward(gone) {
		if _, err := r.output(ctx, "insmod", lab.FilesDir+"/"+m+".ko"); err != nil {
			return err
		}
	}
	r.note = "again: " + strings.Join(gone, ", ")
	return r.patched(ctx)
}

// patched looks whether every loaded module is under the livepatch.
func (r *run) patched(ctx context.Context) error {
	for _, f := range r.Built.Functions {
		if !slices.Contains(r.present, f.Object) {
			continue
		}
		file := "/sys/kernel/livepatch/" + r.Built.Sequence.ModuleName() + "/" + f.Object + "/patched"
		out, err := r.output(ctx, "cat", file)
		if err != nil {
			return err
		}
		if out != "1" {
			return lab.Failf("module %s is loaded and not under the livepatch", f.Object)
		}
	}
	return nil
}
