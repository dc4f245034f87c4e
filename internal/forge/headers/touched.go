// SPDX-License-Identifier: Apache-2.0

package headers

// Place is a piece of a file at its outermost level that a change touches: a
// function, a type, a variable.
type Place struct {
	First    int    // line, from 1
	Function string // its name, where it is one
}

// Touched lists the functions, types and variables that a change is within.
// What stands between two of them, as a new function does, is in none.
func Touched(old string, changes []Change) [][]Place {
	its := parse(old)
	out := make([][]Place, len(changes))
	for i, c := range changes {
		for _, it := range its {
			if it.kind == blank || it.directive != "" && it.directive != "define" {
				continue
			}
			if removed, inserted := c.within(it); len(removed)+len(inserted) > 0 {
				out[i] = append(out[i], Place{it.first, it.function})
			}
		}
	}
	return out
}
