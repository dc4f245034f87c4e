// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
)

// Places in the differ's tables, struct kpatch_patch_func (kpatch-patch.h) and
// struct kpatch_symbol (kpatch-intermediate.h), in bytes.
const (
	funcPosition   = 32
	funcName       = 40
	symbolPosition = 8
)

// checkPositions compares which of several symbols of one name the differ
// means with how the kernel counts them: the differ counts in the order of the
// symbol table, the kernel by address (kernel/livepatch/core.c). A wrong count
// would replace, or call, another function of that name.
func (j *job) checkPositions(o *object, diff []byte) error {
	f, err := elf.NewFile(bytes.NewReader(diff))
	if err != nil {
		return fmt.Errorf("read the differ's output: %w", err)
	}
	image, err := j.image(j.tree, o.unit.Object)
	if err != nil {
		return err
	}
	for _, t := range []struct {
		section              string
		size, name, position uint64
	}{{".kpatch.funcs", funcEntry, funcName, funcPosition}, {".kpatch.symbols", symbolEntry, symbolName, symbolPosition}} {
		entries, err := readTable(f, t.section, t.size, t.name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			allowed, of := image.Positions(e.name, o.unit.Source)
			said := int(binary.LittleEndian.Uint64(e.data[t.position:]))        //nolint:gosec // compared with small numbers
			if of <= 1 || len(allowed) == 0 || slices.Contains(allowed, said) { // one of another module, or the only one
				continue
			}
			r := j.refusal("unreconcilable", o)
			r.Function = e.name
			r.Detail = fmt.Sprintf("the kernel has %d symbols of this name; the differ means number %d, this file's is %d", of, said, allowed[0])
			j.refuse(r)
		}
	}
	return nil
}
