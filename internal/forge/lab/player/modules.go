// SPDX-License-Identifier: Apache-2.0

package player

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

// Reached lists the modules that the livepatch replaces functions of, and
// those that they need, in the order in which they load.
func (s Subject) Reached() ([]string, error) {
	var out []string
	var add func(m string) error
	add = func(m string) error {
		if slices.Contains(out, m) {
			return nil
		}
		if len(out) == maxModules {
			return fault.New(fault.Invalid, "too_many_modules", "the livepatch needs over %d modules in the lab", maxModules)
		}
		needs, err := dependsOn(s.Tables.Module(m))
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
	if s.Tables.Module == nil {
		return nil, nil
	}
	for _, f := range s.Built.Functions {
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

// module loads and takes out what the livepatch reaches.
func (p *Player) module(ctx context.Context, c call) error {
	switch c.args[0] {
	case "load":
		return p.loadModules(ctx)
	case "unload":
		return p.unloadModules(ctx)
	}
	if err := p.unloadModules(ctx); err != nil {
		return err
	}
	gone := p.note
	if err := p.loadModules(ctx); err != nil {
		return err
	}
	p.note = gone + "; " + p.note
	return nil
}

// loadModules loads what the livepatch reaches. A module that needs hardware
// stays out, and the result says so; one that was in before must come in again.
func (p *Player) loadModules(ctx context.Context) error {
	var absent []string
	for _, m := range p.reached {
		if slices.Contains(p.present, m) {
			continue
		}
		// One whose need stayed out would only make the kernel complain.
		needs, err := dependsOn(p.Tables.Module(m))
		if err != nil {
			return lab.Brokenf(err, "read what module %s needs", m)
		}
		if slices.ContainsFunc(needs, func(n string) bool { return slices.Contains(absent, n) }) {
			absent = append(absent, m)
			continue
		}
		res, err := p.m.Run(ctx, lab.Command{Argv: []string{"insmod", lab.FilesDir + "/" + m + ".ko"}})
		switch {
		case err != nil:
			return err
		case res.Exit == 0:
			p.present = append(p.present, m)
			p.able = append(p.able, m)
		case slices.Contains(p.able, m):
			return lab.Failf("module %s loaded before and does not any more: %s", m, shorten(string(res.Stderr)))
		default:
			absent = append(absent, m)
		}
	}
	p.note = "loaded: " + strings.Join(p.present, ", ")
	if len(absent) > 0 {
		p.note += "; not loaded, perhaps for want of hardware: " + strings.Join(absent, ", ")
	}
	return nil
}

// unloadModules takes the reached modules out, the last first. One that is in
// use stays.
func (p *Player) unloadModules(ctx context.Context) error {
	var gone []string
	for _, m := range slices.Backward(slices.Clone(p.present)) {
		res, err := p.m.Run(ctx, lab.Command{Argv: []string{"rmmod", m}})
		if err != nil {
			return err
		}
		if res.Exit == 0 {
			gone = append(gone, m)
		}
	}
	p.present = slices.DeleteFunc(p.present, func(m string) bool { return slices.Contains(gone, m) })
	p.note = "taken out: " + strings.Join(gone, ", ")
	return nil
}

// patched looks whether every loaded module is under the livepatch.
func (p *Player) patched(ctx context.Context) error {
	for _, f := range p.Built.Functions {
		if !slices.Contains(p.present, f.Object) {
			continue
		}
		file := "/sys/kernel/livepatch/" + p.Built.Sequence.ModuleName() + "/" + f.Object + "/patched"
		out, err := p.output(ctx, "cat", file)
		if err != nil {
			return err
		}
		if out != "1" {
			return lab.Failf("module %s is loaded and not under the livepatch", f.Object)
		}
	}
	return nil
}
