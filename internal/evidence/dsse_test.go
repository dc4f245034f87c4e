// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

// TestPAEIsThatOfTheSpecification: the example of DSSE's protocol.md.
func TestPAEIsThatOfTheSpecification(t *testing.T) {
	const want = "DSSEv1 29 http://example.com/HelloWorld 11 hello world"
	if got := string(pae("http://example.com/HelloWorld", []byte("hello world"))); got != want {
		t.Errorf("%q", got)
	}
}

// verifier lets the other implementation check with one of our keys.
type verifier struct{ k PublicKey }

func (v verifier) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(v.k.bytes[:], data, sig) {
		return dsse.ErrNoSignature
	}
	return nil
}
func (v verifier) KeyID() (string, error)   { return v.k.ID(), nil }
func (v verifier) Public() crypto.PublicKey { return ed25519.PublicKey(v.k.bytes[:]) }

// sample is a policy with one signer of every role, and a good review.
func sample(t *testing.T) (Policy, PrivateKey, Envelope) {
	t.Helper()
	k, err := NewKey("bob", Roles...)
	if err != nil {
		t.Fatal(err)
	}
	p := DefaultPolicy(trust.Lab, BaseScenarios)
	p.Signers = []Signer{k.Signer()}
	e, err := Sign(Module{"klatch_1", strings.Repeat("ab", 32)}, &Review{Decision: Approved, Reviewer: "bob", Sequence: 1,
		Kernel:  kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{1}},
		Sources: []Source{{Name: "a", SHA256: strings.Repeat("cd", 32), Author: "Alice <a@example.org>"}}, Warnings: []string{},
		Comment: "<html> & \u2028 are escaped", Finished: At(time.Unix(1_800_000_000, 0))}, k)
	if err != nil {
		t.Fatal(err)
	}
	return p, k, e
}

// TestAnotherImplementationReadsOurEnvelopes, and takes none that we refuse
// for its signature.
func TestAnotherImplementationReadsOurEnvelopes(t *testing.T) {
	_, k, e := sample(t)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	var theirs dsse.Envelope
	if err := json.Unmarshal(b, &theirs); err != nil {
		t.Fatal(err)
	}
	v, err := dsse.NewEnvelopeVerifier(verifier{k.Public()})
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := v.Verify(t.Context(), &theirs); err != nil || len(ok) != 1 || ok[0].KeyID != k.Public().ID() {
		t.Errorf("their verdict: %v, %v", ok, err)
	}
	theirs.Payload = base64.StdEncoding.EncodeToString(append([]byte(" "), e.Payload...))
	if _, err := v.Verify(t.Context(), &theirs); err == nil {
		t.Error("they take a changed payload")
	}
}

func TestEnvelopesAndKeysComeBack(t *testing.T) {
	p, k, e := sample(t)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseEnvelope(b)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(back, p)
	if err != nil || s.Signer.Name != "bob" || s.Role != Reviewer || s.Subject.Name != "klatch_1" {
		t.Errorf("%+v, %v", s, err)
	}
	file, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParsePrivateKey(file)
	if err != nil || again.Name != "bob" || again.Public() != k.Public() || len(again.Roles) != len(Roles) {
		t.Errorf("%+v, %v", again, err)
	}
	pub, err := ParsePublicKey(k.Public().String())
	if err != nil || pub != k.Public() {
		t.Errorf("%v, %v", pub, err)
	}
	text, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if q, err := ParsePolicy(text, trust.Lab); err != nil || q.Signers[0].Key != k.Public() {
		t.Errorf("%+v, %v", q, err)
	}
}

// TestSignRefusesWhatItsKeyMayNotSay: a key of a builder makes no review, and
// nobody signs in another's name.
func TestSignRefusesWhatItsKeyMayNotSay(t *testing.T) {
	k, err := NewKey("carol", Builder)
	if err != nil {
		t.Fatal(err)
	}
	r := &Review{Decision: Approved, Reviewer: "carol", Sources: []Source{{Name: "a"}}}
	if _, err := Sign(Module{}, r, k); fault.CodeOf(err) != "signer_role" {
		t.Errorf("%v", err)
	}
	k.Roles = Roles
	r.Reviewer = "bob"
	if _, err := Sign(Module{}, r, k); fault.CodeOf(err) != "signer_name" {
		t.Errorf("%v", err)
	}
}

func TestWhoIsAnAuthor(t *testing.T) {
	s := Signer{Name: "alice", Also: []string{"Alice Example <alice@work.example>"}}
	for author, want := range map[string]bool{
		"alice": true, "Alice": true, "ALICE@example.org": true, "Alice  Example": true, "A. E. <alice@work.example>": true,
		"Bob <alice@else.example>": true, "Bob <bob@example.org>": false, "": false, "malice": false, "Bob Example": false,
	} {
		if got := s.Is(author); got != want {
			t.Errorf("%q: %v", author, got)
		}
	}
}

func TestPoliciesThatAreRefused(t *testing.T) {
	p, k, _ := sample(t)
	for name, change := range map[string]func(*Policy){
		"one builder in profile full": func(p *Policy) { p.Profile, p.SelfReview = trust.Full, false },
		"self-review in small":        func(p *Policy) { p.Profile = trust.Small },
		"no tester":                   func(p *Policy) { p.Testers = 0 },
		"no reviewer":                 func(p *Policy) { p.Reviewers = 0 },
		"no age of builds":            func(p *Policy) { p.BuildDays = 0 },
		"no age of tests":             func(p *Policy) { p.TestDays = 0 },
		"no age of reviews":           func(p *Policy) { p.ReviewDays = 0 },
		"no age of VEX":               func(p *Policy) { p.VEXDays = 0 },
		"too many signers":            func(p *Policy) { p.Signers = manySigners(t) },
		"a role twice":                func(p *Policy) { p.Signers = []Signer{{"eve", []Role{Builder, Builder}, k.Public(), nil}} },
		"no scenario":                 func(p *Policy) { p.Required = nil },
		"version 0":                   func(p *Policy) { p.Version = 0 },
		"unknown profile":             func(p *Policy) { p.Profile = "x" },
		"a name twice":                func(p *Policy) { p.Signers = append(p.Signers, Signer{"bob", Roles, mustKey(t).Public(), nil}) },
		"a key twice":                 func(p *Policy) { p.Signers = append(p.Signers, Signer{"eve", Roles, k.Public(), nil}) },
		"unknown role":                func(p *Policy) { p.Signers = []Signer{{"eve", []Role{"king"}, k.Public(), nil}} },
		"no role":                     func(p *Policy) { p.Signers = []Signer{{"eve", nil, k.Public(), nil}} },
		"no key":                      func(p *Policy) { p.Signers = []Signer{{"eve", Roles, PublicKey{}, nil}} },
		"a bad name":                  func(p *Policy) { p.Signers = []Signer{{"../eve", Roles, k.Public(), nil}} },
	} {
		q := p
		change(&q)
		if err := q.Check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func manySigners(t *testing.T) []Signer {
	t.Helper()
	var all []Signer
	for i := range maxSigners + 1 {
		all = append(all, Signer{fmt.Sprintf("s%d", i), Roles, mustKey(t).Public(), nil})
	}
	return all
}

func mustKey(t *testing.T) PrivateKey {
	t.Helper()
	k, err := NewKey("eve", Builder)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// FuzzStatement: the readers of foreign bytes never panic, and what they take
// is in its one form. The signature check is left out by signing whatever
// comes.
func FuzzStatement(f *testing.F) {
	k, err := NewKey("bob", Roles...)
	if err != nil {
		f.Fatal(err)
	}
	p := DefaultPolicy(trust.Lab, BaseScenarios)
	p.Signers = []Signer{k.Signer()}
	kb := kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{1}}
	m := Module{"klatch_1", strings.Repeat("ab", 32)}
	at := time.Unix(1_800_000_000, 0)
	src := []Source{{Name: "CVE-2026-0001", SHA256: strings.Repeat("cd", 32), Author: "alice"}}
	for _, pred := range []Predicate{
		NewProvenance("bob", "v1", Definition{External: External{kb, 1, src}}, Proof{Functions: []livepatch.Function{{Object: "vmlinux", Name: "f"}}}, at, at),
		NewTestResult(Tried{Tester: "bob", Kernel: kb, Sequence: 1, Finished: at, Scenarios: []Scenario{{Name: "boot", Verdict: "pass"}}}),
		&Review{Decision: Approved, Reviewer: "bob", Kernel: kb, Sequence: 1, Sources: src, Finished: At(at)},
		NewVEX("bob", kb, 1, []VEXStatement{{Vulnerability: VEXName{"CVE-2026-0001"}, Status: "fixed"}}, at),
	} {
		e, err := Sign(m, pred, k)
		if err != nil {
			f.Fatal(err)
		}
		b, err := e.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, e.Payload)
	}
	f.Fuzz(func(t *testing.T, file, payload []byte) {
		if e, err := ParseEnvelope(file); err == nil {
			if again, err := e.Encode(); err != nil || string(again) != string(file) {
				t.Errorf("another form was taken: %q, %v", file, err)
			}
			_, _ = Open(e, p)
		}
		if fl, err := ParseFile(file); err == nil {
			_, _ = Check(p, Facts{About: fl.About, Signed: fl.Signed, Now: fl.Signed}, fl.Statements)
		}
		_, _ = ParsePolicy(file, trust.Lab)
		s, err := Open(seal(payload, k), p)
		if err != nil {
			if fault.CodeOf(err) == "" || fault.HintOf(err) == "" {
				t.Errorf("refusal without code or next step: %v", err)
			}
			return
		}
		c := s.predicate.claim()
		_, _ = Check(p, Facts{About: About{s.Subject, c.kernel, c.sequence}, Signed: c.finished, Now: c.finished}, []Envelope{s.Envelope})
	})
}
