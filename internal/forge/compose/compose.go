// SPDX-License-Identifier: Apache-2.0

// Package compose turns a queue and a kernel build into a build plan: exactly
// these source patches, on this source, with these tools. The plan's digest
// names its inputs; the same digest must give the same livepatch.
package compose

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
)

// Plan is everything that goes into one livepatch.
type Plan struct {
	Kernel  catalog.Entry
	Patches []queue.Patch
	// Handwritten is a livepatch in C; nil where there are source patches. A
	// plan with both is refused by the driver.
	Handwritten *queue.Handwritten
	Sequence    livepatch.Sequence
	Tools       map[string]string // name to version and digest
}

// New composes a plan; an empty queue has none.
func New(e catalog.Entry, patches []queue.Patch, tools map[string]string, seq livepatch.Sequence) (Plan, error) {
	if len(patches) == 0 {
		return Plan{}, fault.New(fault.Invalid, "queue_empty", "queue %s is empty: nothing to build", e.Series).
			WithHint("add a fix: klatch-forge queue import or klatch-forge queue add")
	}
	return Plan{Kernel: e, Patches: patches, Sequence: seq, Tools: tools}, nil
}

// NewHandwritten composes a plan of a hand-written livepatch; patches are what
// else lies in the queue, which should be nothing.
func NewHandwritten(e catalog.Entry, h *queue.Handwritten, patches []queue.Patch, tools map[string]string, seq livepatch.Sequence) Plan {
	return Plan{Kernel: e, Handwritten: h, Patches: patches, Sequence: seq, Tools: tools}
}

// Fixes lists the CVEs that the plan covers, in order, each once.
func (p Plan) Fixes() []cve.ID {
	var ids []cve.ID
	if p.Handwritten != nil {
		ids = append(ids, p.Handwritten.Fixes...)
	}
	for _, s := range p.Patches {
		for _, id := range s.Fixes {
			if !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// Files lists the files of the kernel's source that the patches touch, or of
// whose functions a hand-written livepatch replaces some, in order, each once.
func (p Plan) Files() []string {
	var files []string
	if p.Handwritten != nil {
		for _, f := range p.Handwritten.Functions {
			if !slices.Contains(files, f.File) {
				files = append(files, f.File)
			}
		}
	}
	for _, s := range p.Patches {
		for _, f := range s.Files {
			if !slices.Contains(files, f) {
				files = append(files, f)
			}
		}
	}
	return files
}

// Digest names the inputs. The sequence is not one of them: the same queue
// keeps its sequence when it is built again.
func (p Plan) Digest() (string, error) {
	type patch struct {
		Name, SHA256 string
		Fixes        []cve.ID
	}
	type file struct{ Name, SHA256 string }
	in := struct {
		Format  string
		Kernel  catalog.Entry
		Tools   map[string]string
		Patches []patch
		Source  []file `json:",omitempty"` // of a hand-written livepatch, what it declares among them
	}{Format: "klatch-plan/1", Kernel: p.Kernel, Tools: p.Tools}
	for _, s := range p.Patches {
		sum := sha256.Sum256(s.Diff)
		in.Patches = append(in.Patches, patch{s.Name, hex.EncodeToString(sum[:]), s.Fixes})
	}
	if p.Handwritten != nil {
		for _, f := range p.Handwritten.Files {
			sum := sha256.Sum256(f.Content)
			in.Source = append(in.Source, file{f.Name, hex.EncodeToString(sum[:])})
		}
	}
	b, err := json.Marshal(in) // map keys are sorted
	if err != nil {
		return "", fmt.Errorf("digest of the plan: %w", err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// Conflict says in words why a patch does not apply: the earlier ones that are
// in its way, what patch(1) said, and the hunks that it rejected.
func Conflict(earlier []queue.Patch, p queue.Patch, said, rejects []byte) string {
	var b strings.Builder
	if who := InTheWay(earlier, p); len(who) > 0 {
		fmt.Fprintf(&b, "in the way: %s\n", strings.Join(who, ", "))
	}
	fmt.Fprintf(&b, "%s\n%s", bytes.TrimSpace(said), bytes.TrimRight(rejects, "\n"))
	return b.String()
}

// near is how far apart two changes may be and still be in each other's way:
// the lines of context of a unified diff.
const near = 3

// InTheWay names the earlier patches that change the lines around which a
// patch changes something. All are taken to be made from the same source.
func InTheWay(earlier []queue.Patch, p queue.Patch) []string {
	mine := lines(p)
	var names []string
	for _, e := range earlier {
		theirs := lines(e)
		for f, ls := range mine {
			if slices.ContainsFunc(ls, func(a int) bool {
				return slices.ContainsFunc(theirs[f], func(b int) bool { return a-b <= near && b-a <= near })
			}) {
				names = append(names, e.Name)
				break
			}
		}
	}
	return names
}

// lines lists the lines of the old text that a patch changes, by file.
func lines(p queue.Patch) map[string][]int {
	out := map[string][]int{}
	for f, e := range queue.Edits(p.Diff) {
		out[f] = append(out[f], e.Removed...)
		for _, n := range e.Inserted {
			out[f] = append(out[f], n.Before)
		}
	}
	return out
}
