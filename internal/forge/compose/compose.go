// SPDX-License-Identifier: Apache-2.0

// Package compose turns a queue and a kernel build into a build plan: exactly
// these source patches, on this source, with these tools. The plan's digest
// names its inputs; the same digest must give the same livepatch.
package compose

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
)

// Plan is everything that goes into one livepatch.
type Plan struct {
	Kernel   catalog.Entry
	Patches  []queue.Patch
	Sequence livepatch.Sequence
	Tools    map[string]string // name to version and digest
}

// New composes a plan; an empty queue has none.
func New(e catalog.Entry, patches []queue.Patch, tools map[string]string, seq livepatch.Sequence) (Plan, error) {
	if len(patches) == 0 {
		return Plan{}, fault.New(fault.Invalid, "queue_empty", "queue %s is empty: nothing to build", e.Series).
			WithHint("add a fix: klatch-forge queue import or klatch-forge queue add")
	}
	return Plan{Kernel: e, Patches: patches, Sequence: seq, Tools: tools}, nil
}

// Fixes lists the CVEs that the plan covers, in order, each once.
func (p Plan) Fixes() []cve.ID {
	var ids []cve.ID
	for _, s := range p.Patches {
		for _, id := range s.Fixes {
			if !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// Files lists the files that the patches touch, in order, each once.
func (p Plan) Files() []string {
	var files []string
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
	in := struct {
		Format  string
		Kernel  catalog.Entry
		Tools   map[string]string
		Patches []patch
	}{Format: "klatch-plan/1", Kernel: p.Kernel, Tools: p.Tools}
	for _, s := range p.Patches {
		sum := sha256.Sum256(s.Diff)
		in.Patches = append(in.Patches, patch{s.Name, hex.EncodeToString(sum[:]), s.Fixes})
	}
	b, err := json.Marshal(in) // map keys are sorted
	if err != nil {
		return "", fmt.Errorf("digest of the plan: %w", err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}
