// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"bytes"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// maxNames limits the names that are followed: where a change reaches more, it
// reaches everything.
const maxNames = 4000

// Bound finds the definitions of types, in the given files, whose text uses
// one of the names, also through macros, typedefs and enumerators. read gives
// the text of a file. whole says that names led to a macro that may make any
// type, or to too many names to follow.
func Bound(names, files []string, read func(file string) ([]byte, error)) (found []Definition, whole bool, err error) {
	type text struct {
		raw []byte
		out *outline
	}
	all := map[string]*text{}
	size := 0
	for _, f := range files {
		b, err := read(f)
		if err != nil {
			return nil, false, err
		}
		if size += len(b); size > maxBound {
			return nil, false, fault.New(fault.Invalid, "sources_too_large", "over %d bytes of source to search", maxBound)
		}
		all[f] = &text{raw: b}
	}
	seen := map[string]bool{}
	hit := map[string]bool{} // a piece that was found
	nest := slices.Clone(names)
	for len(nest) > 0 {
		n := nest[len(nest)-1]
		nest = nest[:len(nest)-1]
		if seen[n] || n == "" {
			continue
		}
		if seen[n] = true; len(seen) > maxNames {
			return found, true, nil
		}
		for _, f := range files {
			t := all[f]
			if !bytes.Contains(t.raw, []byte(n)) {
				continue
			}
			if t.out == nil {
				o := outlined(f, string(t.raw))
				t.out = &o
			}
			for _, p := range t.out.pieces {
				if p.role == harmless || p.role == order || !slices.ContainsFunc(p.ts, func(t token) bool { return t.text == n }) {
					continue
				}
				id := f + "\x00" + p.text
				if hit[id] {
					continue
				}
				hit[id] = true
				switch p.role {
				case types:
					tags, enumerators := defines(p.ts)
					found = append(found, Definition{f, tags, p.fixed})
					nest = append(nest, enumerators...)
				case unknown:
					whole = whole || !strings.HasPrefix(p.ts[0].text, "DEFINE_EVENT")
				case named:
					if p.ts[0].text == "#" || p.ts[0].text == "typedef" {
						nest = append(nest, namesOf(p.ts)...)
					}
				case harmless, order:
				}
			}
		}
	}
	return found, whole, nil
}

// maxBound limits what Bound keeps: the headers of one unit have 30 MB.
const maxBound = 512 << 20
