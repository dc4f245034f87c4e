// SPDX-License-Identifier: Apache-2.0

package delta

import (
	"slices"
	"strings"
)

// Function is what an object file has of one function.
type Function struct {
	Symbol  string // with the compiler's suffix, such as .isra.0
	Bytes   int
	Refers  []string // names of functions and variables, and strings in quotes
	Callers []string // functions of the same object that refer to it
}

// Describe finds a function by its name in the source, with all clones that
// the compiler made of it: .isra, .constprop, .part and .cold
// (gcc, -fipa-sra, -fipa-cp, -fpartial-inlining, -freorder-blocks-and-partition).
func Describe(object []byte, name string) ([]Function, error) {
	o, err := read(object)
	if err != nil {
		return nil, err
	}
	var out []Function
	for _, t := range o.things {
		if !t.function || Source(t.name) != name {
			continue
		}
		f := Function{Symbol: t.symbol, Bytes: int(t.size)} //nolint:gosec // below the section's limit
		for _, r := range t.refs {
			if !slices.Contains(f.Refers, r.target) {
				f.Refers = append(f.Refers, r.target)
			}
		}
		for _, by := range o.things {
			if by.function && by.name != t.name && slices.ContainsFunc(by.refs, func(r reference) bool { return r.target == t.name }) &&
				!slices.Contains(f.Callers, by.name) {
				f.Callers = append(f.Callers, by.name)
			}
		}
		slices.Sort(f.Refers)
		slices.Sort(f.Callers)
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b Function) int { return strings.Compare(a.Symbol, b.Symbol) })
	return out, nil
}

// Source is a symbol's name as the source has it.
func Source(symbol string) string {
	name, _, _ := strings.Cut(symbol, ".")
	return name
}

// NewData lists the variables and constants that only the patched object has.
func NewData(original, patched []byte) ([]string, error) {
	before, err := read(original)
	if err != nil {
		return nil, err
	}
	after, err := read(patched)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, t := range after.things {
		if t.function || slices.Contains(out, t.name) {
			continue
		}
		if !slices.ContainsFunc(before.things, func(b thing) bool { return b.name == t.name }) {
			out = append(out, t.name)
		}
	}
	slices.Sort(out)
	return out, nil
}
