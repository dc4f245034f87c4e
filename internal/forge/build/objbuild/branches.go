// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"debug/elf"
	"fmt"
	"slices"

	"klatch/internal/forge/build/ibt"
	"klatch/internal/forge/build/match"
)

// branches refuses what calls a function by address whose landing pad the
// kernel took away. The patched object is enough to see it: what the kernel's
// own code takes the address of is never among those functions.
func (j *job) branches(o *object, patched []byte) error {
	if !j.delayed || o.same {
		return nil
	}
	taken, err := ibt.Taken(patched)
	if err != nil {
		return fmt.Errorf("addresses in %s: %w", o.unit.Target, err)
	}
	changed, err := match.Changed(o.original, o.patched)
	if err != nil {
		return err
	}
	for _, object := range slices.Compact([]string{vmlinux, o.unit.Object}) {
		sealed, err := j.sealedIn(object)
		if err != nil {
			return err
		}
		for _, n := range taken {
			if sealed[n] && !slices.Contains(changed, n) { // a replaced one has its pad in the livepatch
				r := j.refusal("landing_pad_gone", o)
				r.Function = n
				j.refuse(r)
			}
		}
	}
	return nil
}

// sealedIn lists the functions of vmlinux or a module that must not be called by
// address, once for all builds.
func (j *job) sealedIn(object string) (map[string]bool, error) {
	j.imageMu.Lock()
	defer j.imageMu.Unlock()
	if s, ok := j.sealed[object]; ok {
		return s, nil
	}
	file := j.tree.Vmlinux()
	if object != vmlinux {
		file = j.tree.ModuleFile(object)
	}
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", object, err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	s, err := ibt.Sealed(f)
	if err != nil {
		return nil, fmt.Errorf("functions of %s without landing pad: %w", object, err)
	}
	if j.sealed == nil {
		j.sealed = map[string]map[string]bool{}
	}
	j.sealed[object] = s
	return s, nil
}
