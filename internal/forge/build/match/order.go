// SPDX-License-Identifier: Apache-2.0

package match

import (
	"cmp"
	"fmt"
	"slices"
)

// Twins says why the symbols of one name are not the same ones in the same
// order in two images of a kernel, or "". The kernel counts symbols of one
// name by their order (see Position): whoever counted in one image must know
// that the other counts alike. A symbol is known by its source file, where
// both images say it, its size and its kind.
func (k *Image) Twins(other *Image, name string) string {
	a, b := k.inOrder(name), other.inOrder(name)
	if len(a) != len(b) {
		return fmt.Sprintf("%d here, %d there", len(a), len(b))
	}
	files := len(k.files) > 0 && len(other.files) > 0
	for i := range a {
		switch x, y := a[i], b[i]; {
		case files && x.file != y.file:
			return fmt.Sprintf("number %d is of %q here, of %q there", i+1, x.file, y.file)
		case x.size != y.size || x.code != y.code || x.local != y.local:
			return fmt.Sprintf("number %d has %d bytes here, %d there", i+1, x.size, y.size)
		}
	}
	return ""
}

// inOrder lists the symbols of a name as the kernel counts them.
func (k *Image) inOrder(name string) []symbol {
	all := slices.Clone(k.byName[name])
	if len(k.relocs) == 0 { // a module's table keeps its order
		slices.SortStableFunc(all, func(a, b symbol) int { return cmp.Compare(a.addr, b.addr) })
	}
	return all
}
