// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

const (
	provenanceType = "https://slsa.dev/provenance/v1"
	buildType      = "urn:klatch:build:1"
	builderPrefix  = "urn:klatch:builder:"
	matchProof     = "match-proof"
)

// Provenance says what a livepatch was built from, in the form of SLSA
// provenance 1 (slsa.dev/spec/v1.2/build-provenance). Two builders must agree
// in all of Definition.
type Provenance struct {
	Definition Definition `json:"buildDefinition"`
	Run        Run        `json:"runDetails"`
}

// Definition is everything that decides what the module's bytes are.
type Definition struct {
	BuildType string   `json:"buildType"`
	External  External `json:"externalParameters"`
	Internal  Internal `json:"internalParameters"`
	// Dependencies are the kernel's packages and configuration, and the tools.
	Dependencies []Descriptor `json:"resolvedDependencies"`
}

// External is what the publisher chose.
type External struct {
	Kernel   kernel.Build       `json:"kernel"`
	Sequence livepatch.Sequence `json:"sequence"`
	Sources  []Source           `json:"sources"`
}

// Source is one source patch, or one file of a hand-written livepatch, which
// has no fixes of its own.
type Source struct {
	Name   string   `json:"name"`
	SHA256 string   `json:"sha256"`
	Fixes  []cve.ID `json:"fixes,omitempty"`
	Author string   `json:"author"` // who put it into the queue; empty where nobody is named
}

// Internal is what followed from it.
type Internal struct {
	Plan   string `json:"plan"`   // digest of the build plan
	Driver string `json:"driver"` // of the builder
}

// Run is one run of one builder.
type Run struct {
	Builder struct {
		ID      string            `json:"id"`
		Version map[string]string `json:"version"`
	} `json:"builder"`
	Metadata struct {
		Started  time.Time `json:"startedOn"`
		Finished time.Time `json:"finishedOn"`
	} `json:"metadata"`
	Byproducts []Byproduct `json:"byproducts"`
}

// Byproduct is the match proof.
type Byproduct struct {
	Name        string `json:"name"`
	Annotations Proof  `json:"annotations"`
}

// Proof sums up how the build environment was proved, and what came out.
type Proof struct {
	Checked   int                  `json:"checked"`   // functions compared with the kernel's own code
	Identical int                  `json:"identical"` // of these
	Functions []livepatch.Function `json:"functions"` // replaced
	Warnings  []string             `json:"warnings"`  // codes for the reviewer
}

// NewProvenance is the statement of one builder.
func NewProvenance(builder, version string, d Definition, p Proof, started, finished time.Time) *Provenance {
	d.BuildType = buildType
	out := &Provenance{Definition: d}
	out.Run.Builder.ID = builderPrefix + builder
	out.Run.Builder.Version = map[string]string{"klatch-forge": version}
	out.Run.Metadata.Started, out.Run.Metadata.Finished = At(started), At(finished)
	out.Run.Byproducts = []Byproduct{{matchProof, p}}
	return out
}

func (p *Provenance) role() Role { return Builder }

func (p *Provenance) claim() claim {
	e := p.Definition.External
	return claim{strings.TrimPrefix(p.Run.Builder.ID, builderPrefix), p.Run.Metadata.Finished, e.Kernel, e.Sequence}
}

func (p *Provenance) check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Untrusted, "", "provenance: "+format, args...)
	}
	switch {
	case p.Definition.BuildType != buildType:
		return bad("build type %.60q, want %q", p.Definition.BuildType, buildType)
	case !strings.HasPrefix(p.Run.Builder.ID, builderPrefix):
		return bad("builder %.60q is not one of ours", p.Run.Builder.ID)
	case len(p.Definition.External.Sources) == 0:
		return bad("no source patch")
	case len(p.Run.Byproducts) != 1 || p.Run.Byproducts[0].Name != matchProof:
		return bad("no match proof")
	case len(p.Run.Byproducts[0].Annotations.Functions) == 0:
		return bad("no function is replaced")
	}
	for _, s := range p.Definition.External.Sources {
		if !isSHA256(s.SHA256) || s.Name == "" {
			return bad("source %.60q has no SHA-256", s.Name)
		}
	}
	return nil
}

func (p *Provenance) proof() Proof { return p.Run.Byproducts[0].Annotations }
