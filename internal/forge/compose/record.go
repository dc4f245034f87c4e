// SPDX-License-Identifier: Apache-2.0

package compose

import (
	"bytes"
	"encoding/json"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
)

const recordFormat = "klatch-plan-record/1"

// MaxRecord limits the record of a plan, in bytes: a thousand source patches
// of upstream have 10 MB.
const MaxRecord = 256 << 20

// record is a plan with all that its digest covers, so that somebody who has
// the kernel's packages can build it again.
type record struct {
	Format   string             `json:"format"`
	Kernel   catalog.Entry      `json:"kernel"`
	Sequence livepatch.Sequence `json:"sequence"`
	Tools    map[string]string  `json:"tools"`
	Patches  []recordedPatch    `json:"patches"`
	Source   []recordedFile     `json:"source"` // of a hand-written livepatch
}

type recordedPatch struct {
	Name   string   `json:"name"`
	Fixes  []cve.ID `json:"fixes"`
	Origin string   `json:"origin"`
	Author string   `json:"author"`
	Diff   []byte   `json:"diff"`
}

type recordedFile struct {
	Name    string `json:"name"`
	Content []byte `json:"content"`
}

// Encode writes the record of a plan.
func (p Plan) Encode() ([]byte, error) {
	r := record{recordFormat, p.Kernel, p.Sequence, p.Tools, []recordedPatch{}, []recordedFile{}}
	for _, s := range p.Patches {
		r.Patches = append(r.Patches, recordedPatch{s.Name, s.Fixes, s.Origin, s.Author, s.Diff})
	}
	if p.Handwritten != nil {
		for _, f := range p.Handwritten.Files {
			r.Source = append(r.Source, recordedFile{f.Name, f.Content})
		}
	}
	b, err := json.MarshalIndent(r, "", " ")
	return append(b, '\n'), err
}

// ParseRecord reads the record of a plan that somebody else made: its source
// patches are linted as those of a queue are.
func ParseRecord(b []byte) (Plan, error) {
	var r record
	bad := func(format string, args ...any) (Plan, error) {
		return Plan{}, fault.New(fault.Invalid, "bad_plan", "recorded plan: "+format, args...)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return bad("%w", err)
	}
	if r.Format != recordFormat {
		return bad("format %.40q, want %q", r.Format, recordFormat)
	}
	p := Plan{Kernel: r.Kernel, Sequence: r.Sequence, Tools: r.Tools}
	for _, s := range r.Patches {
		files, plain, err := queue.Plain(s.Diff)
		if err != nil {
			return bad("source patch %.100q: %w", s.Name, err)
		}
		if !bytes.Equal(plain, s.Diff) {
			return bad("source patch %.100q holds more than heads and hunks", s.Name)
		}
		p.Patches = append(p.Patches, queue.Patch{Name: s.Name, Fixes: s.Fixes, Origin: s.Origin, Author: s.Author, Diff: s.Diff, Files: files})
	}
	if len(r.Source) > 0 {
		var files []queue.SourceFile
		for _, f := range r.Source {
			files = append(files, queue.SourceFile{Name: f.Name, Content: f.Content})
		}
		var err error
		if p.Handwritten, err = queue.ParseHandwritten(files); err != nil {
			return bad("%w", err)
		}
	}
	if len(p.Patches) == 0 && p.Handwritten == nil {
		return bad("it has no source patch")
	}
	return p, nil
}
