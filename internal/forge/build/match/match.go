// SPDX-License-Identifier: Apache-2.0

// Package match proves that a build environment reproduces the running
// kernel: every function of an object file, compiled unpatched, is compared
// byte by byte with the distribution's own vmlinux or module. Bytes that the
// linker fills in are compared by meaning: where a relocation names a symbol,
// the kernel must refer to that symbol; where it leads to a string, to one of
// the same text.
//
// The kernel changes its text only while it runs (alternatives, jump labels,
// static calls, ftrace), so the bytes in the file are the compiler's.
package match

import "slices"

// Difference is one function that is not what the kernel has.
type Difference struct {
	Object   string `json:"object"` // vmlinux or a module
	File     string `json:"file"`
	Function string `json:"function"`
	Replaced bool   `json:"replaced"` // it would be replaced; otherwise only told
	Why      string `json:"why"`
}

// Proved is one function to be replaced whose every byte is accounted for.
type Proved struct {
	Object      string `json:"object"` // vmlinux or a module
	File        string `json:"file"`
	Function    string `json:"function"`
	Bytes       int    `json:"bytes"`
	Relocations int    `json:"relocations"` // compared by symbol
	Strings     int    `json:"strings"`     // references compared by the text that they lead to
	Unnamed     int    `json:"unnamed"`     // references to places without a name, not compared
	// Which of the symbols of this name it is, as the kernel counts them: 0, or
	// 1, where it is the only one.
	Position int    `json:"position,omitempty"`
	SHA256   string `json:"sha256,omitempty"` // of a hand-written replacement: the bytes that the kernel runs now
	Addr     uint64 `json:"-"`                // in the image
}

// Setting is one part of the environment that is not the distribution's.
type Setting struct {
	Aspect string `json:"aspect"` // compiler, source, config or flags
	Want   string `json:"want"`
	Have   string `json:"have"`
}

// Report is the match figure of a build.
type Report struct {
	Checked     int          `json:"checked"`   // functions compared, all of the touched objects
	Identical   int          `json:"identical"` // of these
	Different   []Difference `json:"different"`
	Replaced    []Proved     `json:"replaced"`
	Environment []Setting    `json:"environment"` // what differs from the distribution's; a hint, not the proof
}

// Empty is a report of nothing, with lists that encode as empty.
func Empty() Report {
	return Report{Different: []Difference{}, Replaced: []Proved{}, Environment: []Setting{}}
}

// Add adds the functions of another report.
func (r *Report) Add(o Report) {
	r.Checked += o.Checked
	r.Identical += o.Identical
	r.Replaced = append(r.Replaced, o.Replaced...)
	r.Different = append(r.Different, o.Different...)
}

// Better takes for each function the comparison that proved it: the report's
// own, or that of the same functions compiled another way.
func (r Report) Better(o Report) Report {
	for i := 0; i < len(r.Different); i++ {
		d := r.Different[i]
		if slices.ContainsFunc(o.Different, func(s Difference) bool { return s.Function == d.Function }) {
			continue
		}
		r.Different = slices.Delete(r.Different, i, i+1)
		i--
		r.Identical++
		if k := slices.IndexFunc(o.Replaced, func(p Proved) bool { return p.Function == d.Function }); k >= 0 {
			r.Replaced = append(r.Replaced, o.Replaced[k])
		}
	}
	return r
}
