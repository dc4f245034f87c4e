// SPDX-License-Identifier: Apache-2.0

// Package evidence holds the signed statements beside a livepatch: who built
// it from what, who tested it how, who reviewed it, and which CVEs it fixes.
// It owns their forms, the policy that says who may sign what, and the check
// that both the signing gate and a stranger run. It reads no files and no
// clock. Start with Check.
//
// Statements are in-toto statements in DSSE envelopes, one signer each:
//
//	provenance   SLSA provenance 1        by a builder
//	test result  in-toto test-result 0.1  by a tester
//	review       our own                  by a reviewer
//	VEX          OpenVEX 0.2              by an analyst
//
// Their subject is always the module before it is signed: that is what
// builders make alike. The keys are none of those that sign modules,
// manifests or metadata, and machines do not know them (ADR 0023).
package evidence

import (
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Module names the module before it is signed.
type Module struct {
	Name   string `json:"name"`   // as in the kernel, such as klatch_2
	SHA256 string `json:"sha256"` // of the file without a module signature
}

// About is what every statement is about.
type About struct {
	Module   Module             `json:"module"`
	Kernel   kernel.Build       `json:"kernel"`
	Sequence livepatch.Sequence `json:"sequence"`
}

// Descriptor is in-toto's ResourceDescriptor.
type Descriptor struct {
	Name        string            `json:"name,omitempty"`
	URI         string            `json:"uri,omitempty"`
	Digest      map[string]string `json:"digest,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const statementType = "https://in-toto.io/Statement/v1"

// statement is in-toto's Statement v1.
type statement struct {
	Type          string          `json:"_type"`
	Subject       []Descriptor    `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

// Predicate is the body of a statement: Provenance, TestResult, Review or VEX.
type Predicate interface {
	role() Role
	claim() claim // what it says of itself
	check() error // of its own form
}

type claim struct {
	who      string
	finished time.Time
	kernel   kernel.Build
	sequence livepatch.Sequence
}

// kind is one sort of statement.
type kind struct {
	predicateType string
	role          Role
	empty         func() Predicate
}

var kinds = []kind{
	{provenanceType, Builder, func() Predicate { return &Provenance{} }},
	{testType, Tester, func() Predicate { return &TestResult{} }},
	{reviewType, Reviewer, func() Predicate { return &Review{} }},
	{vexType, Analyst, func() Predicate { return &VEX{} }},
}

func kindOf(r Role) kind {
	return kinds[slices.IndexFunc(kinds, func(k kind) bool { return k.role == r })]
}

// Sign makes the envelope of a statement about a module.
func Sign(m Module, p Predicate, k PrivateKey) (Envelope, error) {
	kd := kindOf(p.role())
	if err := p.check(); err != nil {
		return Envelope{}, err
	}
	if !k.Signer().May(kd.role) {
		return Envelope{}, fault.New(fault.Denied, "signer_role", "key %s is not one of a %s", k.Name, kd.role).
			WithHint("make one: klatch-forge evidence key --role %s --name NAME", kd.role)
	}
	if who := p.claim().who; who != k.Name {
		return Envelope{}, fault.New(fault.Internal, "signer_name", "statement of %s, key of %s", who, k.Name)
	}
	raw, err := encode(p)
	if err != nil {
		return Envelope{}, err
	}
	payload, err := encode(statement{statementType, []Descriptor{m.descriptor()}, kd.predicateType, raw})
	if err != nil {
		return Envelope{}, err
	}
	return seal(payload, k), nil
}

func (m Module) descriptor() Descriptor {
	return Descriptor{Name: m.Name + ".ko", Digest: map[string]string{"sha256": m.SHA256}}
}

// Statement is an opened envelope: signed by a signer of the policy with the
// role that it needs, and well-formed. Whether it is about the right module is
// Check's to say.
type Statement struct {
	Signer  Signer
	Role    Role
	Subject Module
	Envelope

	predicate Predicate
}

// Open verifies one envelope and reads its statement.
func Open(e Envelope, p Policy) (Statement, error) {
	s := Statement{Envelope: e}
	var err error
	if s.Signer, err = e.open(p); err != nil {
		return s, err
	}
	var st statement
	if err := decode(e.Payload, &st); err != nil {
		return s, refuse("statement_malformed", "statement by %s: %w", s.Signer.Name, err)
	}
	if st.Type != statementType {
		return s, refuse("statement_malformed", "statement by %s has type %.60q, want %q", s.Signer.Name, st.Type, statementType)
	}
	if s.Subject, err = subject(st.Subject); err != nil {
		return s, refuse("statement_malformed", "statement by %s: %w", s.Signer.Name, err)
	}
	for _, k := range kinds {
		if k.predicateType != st.PredicateType {
			continue
		}
		if !s.Signer.May(k.role) {
			return s, refuse("signer_role", "%s signed %s and is no %s", s.Signer.Name, k.what(), k.role)
		}
		s.Role, s.predicate = k.role, k.empty()
		// encoding/json keeps a raw message as it stands, without a line end.
		if err := decode(append(st.Predicate, '\n'), s.predicate); err != nil {
			return s, refuse(k.malformed(), "%s by %s: %w", k.what(), s.Signer.Name, err)
		}
		if err := s.predicate.check(); err != nil {
			return s, refuse(k.malformed(), "%s by %s: %w", k.what(), s.Signer.Name, err)
		}
		return s, nil
	}
	return s, refuse("predicate_unknown", "statement by %s is of type %.80q", s.Signer.Name, st.PredicateType)
}

func (k kind) malformed() fault.Code {
	if k.role == Analyst {
		return "vex_malformed"
	}
	return "statement_malformed"
}

func (k kind) what() string {
	return map[Role]string{Builder: "provenance", Tester: "test result", Reviewer: "review", Analyst: "VEX document"}[k.role]
}

func subject(ds []Descriptor) (Module, error) {
	if len(ds) != 1 {
		return Module{}, fault.New(fault.Untrusted, "", "it has %d subjects, want one", len(ds))
	}
	d := ds[0]
	name, ok := strings.CutSuffix(d.Name, ".ko")
	sum := d.Digest["sha256"]
	if !ok || len(d.Digest) != 1 || !isSHA256(sum) || d.URI != "" || d.Annotations != nil {
		return Module{}, fault.New(fault.Untrusted, "", "its subject is not a module with a SHA-256")
	}
	return Module{name, sum}, nil
}

func isSHA256(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 32 && strings.ToLower(s) == s
}

// At brings a time into the form that statements have: UTC, whole seconds.
func At(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
