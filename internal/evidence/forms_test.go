// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

// TestFormsThatAreRefused: each condition on the form of a statement by
// itself, whoever signs it.
func TestFormsThatAreRefused(t *testing.T) {
	kb := kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{1}}
	at := time.Unix(1_800_000_000, 0)
	sum := strings.Repeat("cd", 32)
	refused := func(name string, p Predicate) {
		t.Helper()
		if err := p.check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	provenance := func(change func(*Provenance)) *Provenance {
		p := NewProvenance("bob", "v1", Definition{External: External{kb, 1, []Source{{Name: "p", SHA256: sum}}}},
			Proof{Functions: []livepatch.Function{{Object: "vmlinux", Name: "f"}}}, at, at)
		change(p)
		return p
	}
	if err := provenance(func(*Provenance) {}).check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Provenance){
		"build type":      func(p *Provenance) { p.Definition.BuildType = "x" },
		"builder":         func(p *Provenance) { p.Run.Builder.ID = "bob" },
		"no source":       func(p *Provenance) { p.Definition.External.Sources = nil },
		"no proof":        func(p *Provenance) { p.Run.Byproducts = nil },
		"two proofs":      func(p *Provenance) { p.Run.Byproducts = append(p.Run.Byproducts, p.Run.Byproducts[0]) },
		"another product": func(p *Provenance) { p.Run.Byproducts[0].Name = "x" },
		"no function":     func(p *Provenance) { p.Run.Byproducts[0].Annotations.Functions = nil },
		"source digest":   func(p *Provenance) { p.Definition.External.Sources[0].SHA256 = strings.ToUpper(sum) },
		"source name":     func(p *Provenance) { p.Definition.External.Sources[0].Name = "" },
	} {
		refused("provenance: "+name, provenance(change))
	}

	tested := func(change func(*TestResult)) *TestResult {
		r := NewTestResult(Tried{Tester: "bob", Kernel: kb, Sequence: 1, Finished: at, Scenarios: []Scenario{{Name: "reboot", Verdict: "pass", Rig: "a"}, {Name: "reboot", Verdict: "pass", Rig: "b"}}})
		change(r)
		return r
	}
	if err := tested(func(*TestResult) {}).check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*TestResult){
		"no trial":        func(r *TestResult) { r.Configuration = nil },
		"two trials":      func(r *TestResult) { r.Configuration = append(r.Configuration, r.Configuration[0]) },
		"another name":    func(r *TestResult) { r.Configuration[0].Name = "x" },
		"another word":    func(r *TestResult) { r.Result = "WARNED" },
		"no name":         func(r *TestResult) { r.Configuration[0].Annotations.Scenarios[0].Name = "" },
		"twice for a rig": func(r *TestResult) { r.Configuration[0].Annotations.Scenarios[1].Rig = "a" },
	} {
		refused("test result: "+name, tested(change))
	}

	refused("review: decision", &Review{Decision: "maybe", Sources: []Source{{Name: "p", SHA256: sum}}})
	refused("review: nothing", &Review{Decision: Approved})
	refused("review: comment", &Review{Decision: Approved, Sources: []Source{{Name: "p", SHA256: sum}}, Comment: strings.Repeat("x", maxComment+1)})

	vex := func(change func(*VEX)) *VEX {
		v := NewVEX("bob", kb, 1, []VEXStatement{
			{Vulnerability: VEXName{"CVE-2026-0001"}, Status: cve.Fixed}, {Vulnerability: VEXName{"CVE-2026-0002"}, Status: cve.Affected, ActionStatement: "reboot"},
			{Vulnerability: VEXName{"CVE-2026-0003"}, Status: cve.NotAffected, Justification: cve.CodeNotPresent},
			{Vulnerability: VEXName{"CVE-2026-0004"}, Status: cve.NotAffected, ImpactStatement: "no such driver"},
			{Vulnerability: VEXName{"CVE-2026-0005"}, Status: cve.UnderInvestigation}}, at)
		change(v)
		return v
	}
	if err := vex(func(*VEX) {}).check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*VEX){
		"context":           func(v *VEX) { v.Context = "x" },
		"id":                func(v *VEX) { v.ID = "" },
		"version":           func(v *VEX) { v.Version = 2 },
		"author":            func(v *VEX) { v.Author = "bob" },
		"time":              func(v *VEX) { v.Timestamp = time.Time{} },
		"no CVE":            func(v *VEX) { v.Statements[0].Vulnerability.Name = "flaw" },
		"twice":             func(v *VEX) { v.Statements[0].Vulnerability.Name = "CVE-2026-0002" },
		"no product":        func(v *VEX) { v.Statements[0].Products = nil },
		"two products":      func(v *VEX) { v.Statements[0].Products = append(v.Statements[0].Products, VEXProduct{"x"}) },
		"no action":         func(v *VEX) { v.Statements[1].ActionStatement = "" },
		"own justification": func(v *VEX) { v.Statements[2].Justification = "because" },
		"no justification":  func(v *VEX) { v.Statements[2].Justification = "" },
		"no impact":         func(v *VEX) { v.Statements[3].ImpactStatement = "" },
		"status":            func(v *VEX) { v.Statements[4].Status = "mended" },
	} {
		refused("VEX: "+name, vex(change))
	}
}

func TestSubjectsThatAreRefused(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	if m, err := subject([]Descriptor{{Name: "klatch_1.ko", Digest: map[string]string{"sha256": sum}}}); err != nil || m != (Module{"klatch_1", sum}) {
		t.Errorf("%+v, %v", m, err)
	}
	for name, ds := range map[string][]Descriptor{
		"none":          nil,
		"no module":     {{Name: "klatch_1", Digest: map[string]string{"sha256": sum}}},
		"two digests":   {{Name: "klatch_1.ko", Digest: map[string]string{"sha256": sum, "sha512": sum}}},
		"another one":   {{Name: "klatch_1.ko", Digest: map[string]string{"sha1": sum[:40]}}},
		"short":         {{Name: "klatch_1.ko", Digest: map[string]string{"sha256": sum[2:]}}},
		"capitals":      {{Name: "klatch_1.ko", Digest: map[string]string{"sha256": strings.ToUpper(sum)}}},
		"with address":  {{Name: "klatch_1.ko", URI: "x", Digest: map[string]string{"sha256": sum}}},
		"with comments": {{Name: "klatch_1.ko", Digest: map[string]string{"sha256": sum}, Annotations: map[string]string{"a": "b"}}},
	} {
		if _, err := subject(ds); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestKeysThatAreRefused(t *testing.T) {
	_, k, _ := sample(t)
	good := k.Public().String()
	for _, s := range []string{"", "x", good[:40], good + "=", " " + good, strings.TrimRight(good, "="), good + "\n"} {
		if _, err := ParsePublicKey(s); fault.CodeOf(err) != "bad_key" {
			t.Errorf("%q: %v", s, err)
		}
	}
	file, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"no PEM":       []byte("x"),
		"another type": bytes.ReplaceAll(file, []byte("PRIVATE KEY"), []byte("PUBLIC KEY")),
		"no key":       pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: []byte("x")}),
		"no name":      bytes.Replace(file, []byte("Name: bob"), []byte("Name: "), 1),
		"no such role": bytes.Replace(file, []byte("Roles: builder"), []byte("Roles: king"), 1),
	} {
		if _, err := ParsePrivateKey(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestLimitsOfTheReaders: nothing large is parsed.
func TestLimitsOfTheReaders(t *testing.T) {
	p, _, e := sample(t)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	large := func(n int) []byte { return append(bytes.Repeat([]byte(" "), n), b...) }
	if _, err := ParseEnvelope(large(maxEnvelope)); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("envelope: %v", err)
	}
	if _, err := ParseFile(large(MaxFile)); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("evidence file: %v", err)
	}
	if _, err := ParsePolicy(large(MaxPolicy), trust.Lab); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("policy: %v", err)
	}
	if _, err := (File{Statements: []Envelope{{Payload: make([]byte, MaxFile)}}}).Encode(); fault.CodeOf(err) != "evidence_too_large" {
		t.Errorf("an evidence file that nobody could read: %v", err)
	}
	text, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"bytes after the end": append(bytes.Clone(text), '{'), "another form": bytes.Replace(text, []byte("policy/1"), []byte("policy/2"), 1)} {
		if _, err := ParsePolicy(bad, trust.Lab); fault.CodeOf(err) != "policy_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParsePolicy(text, trust.Small); fault.CodeOf(err) != "policy_malformed" {
		t.Errorf("a policy of another profile: %v", err)
	}
	for path, want := range map[string]int{"policy/evidence.7.json": 7, "policy/evidence.07.json": 0, "policy/evidence.json": 0, "x/policy/evidence.7.json": 0, "policy/evidence.9999999999.json": 0} {
		if got := PolicyVersion(path); got != want {
			t.Errorf("%s: version %d", path, got)
		}
	}
}
