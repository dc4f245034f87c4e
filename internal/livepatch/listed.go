// SPDX-License-Identifier: Apache-2.0

package livepatch

import (
	"encoding/json"
	"strings"
	"time"

	"klatch/internal/kernel"
)

// ListedFormat is the version word of Listed.
const ListedFormat = "klatch-target/1"

// Listed is what the signed list says of a livepatch beside its digest, so
// that a mirror can choose without opening bundles. Machines believe the
// manifest.
type Listed struct {
	Format   string       `json:"format"`
	Kernel   kernel.Build `json:"kernel"`
	Sequence Sequence     `json:"sequence"`
	Fixes    []Fix        `json:"fixes"`
	// Released is when the livepatch passed the signing gate, by the
	// publisher's clock; zero in lists that were signed before it was told.
	Released time.Time `json:"released_at,omitzero"`
}

// ParseListed reads it. A list that says nothing, or what this version does
// not know, gives false: nobody may refuse a livepatch because of it.
func ParseListed(raw json.RawMessage) (Listed, bool) {
	var l Listed
	if raw == nil || json.Unmarshal(raw, &l) != nil || l.Format != ListedFormat || l.Sequence == 0 {
		return Listed{}, false
	}
	return l, true
}

// Place is where a target that belongs to one kernel lies. Two builds of one
// release share it.
type Place struct {
	Distro, Arch, Release string
}

// PlaceOf reads a target path of the form DISTRO/ARCH/RELEASE/name: a
// livepatch, its evidence or its proof. Policies, recalls and notices have
// none.
func PlaceOf(target string) (Place, bool) {
	parts := strings.Split(target, "/")
	if len(parts) != 4 {
		return Place{}, false
	}
	if _, err := kernel.ParseRelease(parts[2]); err != nil {
		return Place{}, false
	}
	return Place{parts[0], parts[1], parts[2]}, true
}

// BundleOf is the livepatch that a target goes with: itself, or the one whose
// evidence or proof it is.
func BundleOf(target string) string {
	dir, name := "", target
	if i := strings.LastIndexByte(target, '/'); i >= 0 {
		dir, name = target[:i+1], target[i+1:]
	}
	if i := strings.IndexByte(name, '.'); i >= 0 {
		name = name[:i]
	}
	return dir + name + BundleSuffix
}
