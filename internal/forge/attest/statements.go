// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/queue"
	"klatch/internal/kernel"
)

const statementsDir = "evidence"

// maxStatement limits one statement's file, in bytes.
const maxStatement = evidence.MaxFile

// Put writes a signed statement beside a build, in place of an older one of
// the same signer and role, and returns the file's name.
func Put(buildDir string, r evidence.Role, signer string, e evidence.Envelope) (string, error) {
	b, err := e.Encode()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(buildDir, statementsDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := durable.SyncDir(buildDir); err != nil {
		return "", err
	}
	file := filepath.Join(dir, string(r)+"-"+signer+".json")
	return file, durable.WriteFile(file, b, 0o644)
}

// Statements reads all envelopes beside a build, by file name.
func Statements(buildDir string) ([]evidence.Envelope, error) {
	files, err := filepath.Glob(filepath.Join(buildDir, statementsDir, "*.json"))
	if err != nil {
		return nil, err
	}
	all := []evidence.Envelope{}
	for _, f := range files {
		e, err := ReadStatement(f)
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// ReadStatement reads one envelope, which may be from another machine.
func ReadStatement(file string) (evidence.Envelope, error) {
	b, err := durable.ReadFile(file, maxStatement)
	if err != nil {
		return evidence.Envelope{}, err
	}
	e, err := evidence.ParseEnvelope(b)
	if err != nil {
		return e, fmt.Errorf("read %s: %w", file, err)
	}
	return e, nil
}

// About says what the statements on a build are about.
func About(b build.Result) evidence.About {
	return evidence.About{Module: evidence.Module{Name: b.Sequence.ModuleName(), SHA256: b.Module.SHA256}, Kernel: b.KernelBuild(), Sequence: b.Sequence}
}

// Sources lists the source patches of a plan, or the files of its
// hand-written livepatch; the one that declares the fixes has them.
func Sources(p compose.Plan) []evidence.Source {
	out := []evidence.Source{}
	for _, s := range p.Patches {
		out = append(out, evidence.Source{Name: s.Name, SHA256: digest(s.Diff), Fixes: s.Fixes, Author: s.Author})
	}
	if h := p.Handwritten; h != nil {
		for _, f := range h.Files {
			src := evidence.Source{Name: f.Name, SHA256: digest(f.Content), Author: h.Author}
			if f.Name == queue.DeclaredName {
				src.Fixes = h.Fixes
			}
			out = append(out, src)
		}
	}
	return out
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// definition says what a livepatch was built from, by its plan.
func definition(p compose.Plan) (evidence.Definition, error) {
	plan, err := p.Digest()
	if err != nil {
		return evidence.Definition{}, err
	}
	e := p.Kernel
	driver := e.Builder
	switch {
	case p.Handwritten != nil:
		driver = "source"
	case driver == "":
		driver = "objbuild"
	}
	deps := []evidence.Descriptor{
		{Name: "source", URI: deb(e.Distro, e.Source, e.SourceV)},
		{Name: "config", Digest: map[string]string{"sha256": e.ConfigSHA256}},
		{Name: "compiler", Annotations: map[string]string{"version": e.Compiler, "command": e.CC, "extra_cflags": e.ExtraCFlags}},
	}
	for _, list := range []struct {
		kind  string
		items map[string]string
	}{{"package", e.Packages}, {"toolchain", e.Toolchain}, {"tool", p.Tools}} {
		for _, name := range slices.Sorted(maps.Keys(list.items)) {
			deps = append(deps, dependency(list.kind, name, list.items[name]))
		}
	}
	return evidence.Definition{External: evidence.External{Kernel: e.Build(), Sequence: p.Sequence, Sources: Sources(p)},
		Internal: evidence.Internal{Plan: plan, Driver: driver}, Dependencies: deps}, nil
}

func deb(d kernel.Distro, name, version string) string {
	os, _, _ := strings.Cut(string(d), "-")
	return fmt.Sprintf("pkg:deb/%s/%s@%s", os, name, version)
}

var sha256Word = regexp.MustCompile(`\b[0-9a-f]{64}\b`)

// dependency describes a package or tool by what the catalog says of it:
// version and digest, in words.
func dependency(kind, name, says string) evidence.Descriptor {
	d := evidence.Descriptor{Name: kind + "/" + name, Annotations: map[string]string{"version": says}}
	if sum := sha256Word.FindString(says); sum != "" {
		d.Digest = map[string]string{"sha256": sum}
	}
	return d
}

// Provenance signs that this builder made the module of a build from its plan.
func Provenance(k evidence.PrivateKey, b build.Result, p compose.Plan, version string, started, finished time.Time) (evidence.Envelope, error) {
	def, err := definition(p)
	if err != nil {
		return evidence.Envelope{}, err
	}
	if def.Internal.Plan != b.Plan {
		return evidence.Envelope{}, fault.New(fault.Internal, "other_plan", "sequence %d was built from another plan", b.Sequence)
	}
	proof := evidence.Proof{Checked: b.Match.Checked, Identical: b.Match.Identical, Functions: b.Functions, Warnings: Warnings(b)}
	return evidence.Sign(About(b).Module, evidence.NewProvenance(k.Name, version, def, proof, started, finished), k)
}

// Warnings lists what a reviewer must look at: code, file and function.
func Warnings(b build.Result) []string {
	out := []string{}
	for _, w := range b.Warnings {
		words := []string{string(w.Code), w.File, w.Function, w.Type}
		out = append(out, strings.Join(slices.DeleteFunc(words, func(s string) bool { return s == "" }), " "))
	}
	return out
}

// Review signs a reviewer's decision on exactly the source patches of a build.
func Review(k evidence.PrivateKey, b build.Result, p compose.Plan, dec evidence.Decision, comment string, at time.Time) (evidence.Envelope, error) {
	return evidence.Sign(About(b).Module, &evidence.Review{Decision: dec, Reviewer: k.Name, Kernel: b.KernelBuild(), Sequence: b.Sequence,
		Sources: Sources(p), Warnings: Warnings(b), Comment: comment, Finished: evidence.At(at)}, k)
}

// VEX signs which CVEs the build fixes, and what is known of others.
func VEX(k evidence.PrivateKey, b build.Result, others []evidence.VEXStatement, at time.Time) (evidence.Envelope, error) {
	var all []evidence.VEXStatement
	for _, id := range b.Fixes {
		all = append(all, evidence.VEXStatement{Vulnerability: evidence.VEXName{Name: id}, Status: cve.Fixed})
	}
	for _, o := range others {
		if !slices.Contains(b.Fixes, o.Vulnerability.Name) {
			all = append(all, o)
		}
	}
	return evidence.Sign(About(b).Module, evidence.NewVEX(k.Name, b.KernelBuild(), b.Sequence, all, at), k)
}

// Confirmed compares what a second builder made with what the first did.
func Confirmed(first, second build.Result) error {
	switch {
	case second.Result != build.Built || second.Module == nil:
		return fault.New(fault.Denied, "builders_differ", "the second build of sequence %d ended %s %s", first.Sequence, second.Result, second.Error).
			WithHint("look at it with: klatch-forge build --kernel %s", first.Kernel)
	case first.Plan != second.Plan || first.KernelBuild() != second.KernelBuild() || first.Sequence != second.Sequence:
		return fault.New(fault.Denied, "builders_differ", "the second build is of another plan")
	case first.Module.SHA256 != second.Module.SHA256:
		return fault.New(fault.Denied, "builders_differ", "sequence %d came out with SHA-256 %s here, %s there", first.Sequence, second.Module.SHA256, first.Module.SHA256).
			WithHint("nothing was signed; find out which builder is wrong: compare plan.json and build.json of both")
	}
	return nil
}

// Add takes a statement that somebody else signed for a build. Only one that
// opens under the policy, about these bytes, is taken.
func Add(d datadir.Dir, b build.Result, e evidence.Envelope) (string, evidence.Statement, error) {
	p, err := ReadPolicy(d)
	if err != nil {
		return "", evidence.Statement{}, err
	}
	s, err := evidence.Open(e, p)
	if err != nil {
		return "", s, err
	}
	if s.Subject != About(b).Module {
		return "", s, evidence.Refuse("other_module", "the statement is about %s with SHA-256 %.16s…, not about %s with %.16s…",
			s.Subject.Name, s.Subject.SHA256, b.Sequence.ModuleName(), b.Module.SHA256)
	}
	file, err := Put(filepath.Dir(b.Module.Path), s.Role, s.Signer.Name, e)
	return file, s, err
}
