// SPDX-License-Identifier: Apache-2.0

package evidencesim

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/tufrepo"
)

// Forger changes the evidence of sequence 2. It holds every key: what the
// metadata or a signature alone would stop is not its business.
type Forger struct {
	*Publisher
	t testing.TB
	// Files are the envelopes beside the build, by file name.
	Files map[string]string
	// Policy is what the publisher says; the forger may write another.
	Policy evidence.Policy
}

// NewForger reads the good evidence.
func NewForger(t testing.TB) *Forger {
	t.Helper()
	f := &Forger{Publisher: New(t), t: t, Files: map[string]string{}}
	names, err := filepath.Glob(filepath.Join(f.dir(), "evidence", "*.json"))
	check(t, err)
	for _, n := range names {
		b, err := os.ReadFile(n)
		check(t, err)
		f.Files[filepath.Base(n)] = string(b)
	}
	if len(f.Files) != 5 {
		t.Fatalf("good evidence has %d files", len(f.Files))
	}
	f.Policy, err = attest.ReadPolicy(f.Dir)
	check(t, err)
	return f
}

func (f *Forger) dir() string { return build.Dir(f.Dir.Path, Release, 2) }

// Payload is the text of a statement.
func (f *Forger) Payload(file string) string {
	f.t.Helper()
	return Payload(f.t, f.Files[file])
}

// Change writes a statement anew with other words, signed by somebody. Every
// pair of old and new text must be found.
func (f *Forger) Change(file, signer string, oldNew ...string) {
	f.t.Helper()
	text := f.Payload(file)
	for i := 0; i < len(oldNew); i += 2 {
		if !strings.Contains(text, oldNew[i]) {
			f.t.Fatalf("%s does not say %q: %s", file, oldNew[i], text)
		}
		text = strings.ReplaceAll(text, oldNew[i], oldNew[i+1])
	}
	f.Files[file] = Envelope(InToto, text, f.Key(signer))
}

// Older makes a statement some days older, in all its times.
func (f *Forger) Older(file, signer string, days int) {
	f.t.Helper()
	text := f.Payload(file)
	for _, word := range []string{`"startedOn":"`, `"finishedOn":"`, `"finished":"`, `"timestamp":"`} {
		i := strings.Index(text, word)
		if i < 0 {
			continue
		}
		i += len(word)
		end := i + strings.IndexByte(text[i:], '"')
		at, err := time.Parse(time.RFC3339, text[i:end])
		check(f.t, err)
		text = text[:i] + at.Add(-time.Duration(days)*24*time.Hour).Format(time.RFC3339) + text[end:]
	}
	if text == f.Payload(file) {
		f.t.Fatalf("%s has no time", file)
	}
	f.Files[file] = Envelope(InToto, text, f.Key(signer))
}

// Stranger makes a key that nobody knows.
func (f *Forger) Stranger() ed25519.PrivateKey {
	f.t.Helper()
	_, k, err := ed25519.GenerateKey(nil)
	check(f.t, err)
	return k
}

// PolicyText is the policy as it is published; the publisher's own encoder
// refuses a bad one.
func (f *Forger) PolicyText() []byte {
	f.t.Helper()
	b, err := json.Marshal(f.Policy)
	check(f.t, err)
	return append(b, '\n')
}

// Write puts envelopes and policy where the signing gate finds them.
func (f *Forger) Write() {
	f.t.Helper()
	dir := filepath.Join(f.dir(), "evidence")
	check(f.t, os.RemoveAll(dir))
	check(f.t, os.MkdirAll(dir, 0o755))
	for name, content := range f.Files {
		check(f.t, durable.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
	}
	policy, err := toml.Marshal(f.Policy)
	check(f.t, err)
	check(f.t, durable.WriteFile(filepath.Join(f.Dir.Path, "evidence.toml"), policy, 0o644))
}

// Published is what a forger publishes.
type Published struct {
	Targets []tufrepo.Target // policy, then bundle and evidence of each sequence
}

// Target finds one whose path ends so.
func (p *Published) Target(suffix string) *tufrepo.Target {
	i := slices.IndexFunc(p.Targets, func(t tufrepo.Target) bool { return strings.HasSuffix(t.Path, suffix) })
	if i < 0 {
		return nil
	}
	return &p.Targets[i]
}

// Good is what the publisher would publish, with the forger's envelopes as
// the evidence of sequence 2.
func (f *Forger) Good() *Published {
	f.t.Helper()
	var p Published
	p.Targets = append(p.Targets, tufrepo.Target{Path: f.Policy.TargetPath(), Content: f.PolicyText()})
	all, err := build.Read(f.Dir.Path, Release)
	check(f.t, err)
	for _, b := range all {
		bundle, err := os.ReadFile(sign.BundleFile(f.Dir, b))
		check(f.t, err)
		path := livepatch.Manifest{Kernel: b.KernelBuild(), Module: livepatch.Module{Name: b.Sequence.ModuleName()}}.TargetPath()
		file, err := attest.ReadFile(filepath.Dir(b.Module.Path))
		check(f.t, err)
		content, err := file.Encode()
		check(f.t, err)
		if b.Sequence == 2 {
			content = f.assemble(string(content))
		}
		to, _ := evidence.TargetPath(path)
		p.Targets = append(p.Targets, tufrepo.Target{Path: path, Content: bundle}, tufrepo.Target{Path: to, Content: content})
	}
	return &p
}

// assemble puts the envelopes into the frame of a good evidence file.
func (f *Forger) assemble(good string) []byte {
	frame, _, _ := strings.Cut(good, `"statements":`)
	var all []string
	for _, name := range slices.Sorted(maps.Keys(f.Files)) {
		all = append(all, strings.TrimSuffix(f.Files[name], "\n"))
	}
	return fmt.Appendf(nil, "%s\"statements\":[%s]}\n", frame, strings.Join(all, ","))
}

// Publish publishes with the publisher's own keys, past every check.
func (f *Forger) Publish(p *Published) {
	f.t.Helper()
	keys, err := sign.RepositoryKeys(f.Dir, sign.All)
	check(f.t, err)
	_, err = tufrepo.Publish(f.t.Context(), f.Dir.Repository(), tufrepo.Publication{Targets: p.Targets}, keys, time.Now())
	check(f.t, err)
}

// Attack is one way to spoil the evidence of sequence 2.
type Attack struct {
	Name string
	Code fault.Code
	// Spoil changes files or policy.
	Spoil func(*Forger)
	// Gate is another code at the signing gate, where that differs.
	Gate fault.Code
}

const (
	provenanceA = "builder-" + BuilderA + ".json"
	provenanceB = "builder-" + BuilderB + ".json"
	testResult  = "tester-" + Tester + ".json"
	review      = "reviewer-" + Bob + ".json"
	vex         = "analyst-" + Analyst + ".json"
)

// reviewBy lets somebody else sign bob's review, in their own name.
func (f *Forger) reviewBy(who string) {
	f.Change(review, who, `"reviewer":"bob"`, fmt.Sprintf(`"reviewer":%q`, who))
}

// last is a scenario that the policy requires; one that replaces sequence 1
// comes after it.
var last = evidence.BaseScenarios[len(evidence.BaseScenarios)-1]

func passedScenario(name string) string { return fmt.Sprintf(`{"name":%q,"verdict":"pass"}`, name) }

// Attacks are group A of the attack catalog: each must be refused with its
// code, by the signing gate and by a stranger.
var Attacks = []Attack{
	{Name: "builder B is missing", Code: "too_few_builders", Spoil: func(f *Forger) { delete(f.Files, provenanceB) }},
	{Name: "no builder at all", Code: "no_provenance", Spoil: func(f *Forger) { delete(f.Files, provenanceA); delete(f.Files, provenanceB) }},
	{Name: "the builders' digests differ", Code: "builders_differ", Spoil: func(f *Forger) {
		f.Change(provenanceB, BuilderB, f.Build.Module.SHA256, hash("other bytes"))
	}},
	{Name: "the builders used other tools", Code: "builders_differ", Spoil: func(f *Forger) {
		f.Change(provenanceB, BuilderB, "0.9.10 ", "0.9.11 ")
	}},
	{Name: "the builders' match proofs differ", Code: "builders_differ", Spoil: func(f *Forger) {
		f.Change(provenanceB, BuilderB, `"identical":10`, `"identical":9`)
	}},
	{Name: "one builder signs for two", Code: "signer_name", Spoil: func(f *Forger) {
		f.Files[provenanceB] = Envelope(InToto, f.Payload(provenanceB), f.Key(BuilderA))
	}},
	{Name: "one builder signs twice", Code: "signed_twice", Spoil: func(f *Forger) { f.Files[provenanceB] = f.Files[provenanceA] }},
	{Name: "the builder's key is not allowed", Code: "unknown_signer", Spoil: func(f *Forger) {
		f.Files[provenanceB] = Envelope(InToto, f.Payload(provenanceB), f.Stranger())
	}},
	{Name: "a tester says who built it", Code: "signer_role", Spoil: func(f *Forger) {
		f.Change(provenanceB, Tester, "urn:klatch:builder:"+BuilderB, "urn:klatch:builder:"+Tester)
	}},
	{Name: "a builder reviews", Code: "signer_role", Spoil: func(f *Forger) { f.reviewBy(BuilderA) }},
	{Name: "an unknown tester", Code: "unknown_signer", Spoil: func(f *Forger) {
		f.Files[testResult] = Envelope(InToto, f.Payload(testResult), f.Stranger())
	}},
	{Name: "payload type confusion, signed as another type", Code: "payload_type", Spoil: func(f *Forger) {
		f.Files[testResult] = Envelope("application/vnd.klatch.note", f.Payload(testResult), f.Key(Tester))
	}},
	{Name: "payload type confusion, renamed after signing", Code: "bad_signature", Spoil: func(f *Forger) {
		e := Envelope("application/vnd.klatch.note", f.Payload(testResult), f.Key(Tester))
		f.Files[testResult] = strings.Replace(e, "application/vnd.klatch.note", InToto, 1)
	}},
	{Name: "the payload is changed after signing", Code: "bad_signature", Spoil: func(f *Forger) {
		other := Envelope(InToto, strings.Replace(f.Payload(testResult), `"pass"`, `"fail"`, 1))
		_, sigs, _ := strings.Cut(f.Files[testResult], `"signatures":`)
		head, _, _ := strings.Cut(other, `"signatures":`)
		f.Files[testResult] = head + `"signatures":` + sigs
	}},
	{Name: "zero signatures", Code: "signature_count", Spoil: func(f *Forger) { f.Files[testResult] = Envelope(InToto, f.Payload(testResult)) }},
	{Name: "duplicate signature", Code: "signature_count", Spoil: func(f *Forger) {
		f.Files[testResult] = Envelope(InToto, f.Payload(testResult), f.Key(Tester), f.Key(Tester))
	}},
	{Name: "one key under two ids in the envelope", Code: "signature_count", Spoil: func(f *Forger) {
		e := Envelope(InToto, f.Payload(provenanceA), f.Key(BuilderA), f.Key(BuilderA))
		f.Files[provenanceA] = strings.Replace(e, KeyID(f.Key(BuilderA)), KeyID(f.Key(BuilderB)), 1)
		delete(f.Files, provenanceB)
	}},
	{Name: "one key under two names in the policy", Code: "policy_malformed", Gate: "bad_evidence_policy", Spoil: func(f *Forger) {
		f.Policy.Signers[len(f.Policy.Signers)-1].Key = f.Policy.Signers[0].Key
	}},
	{Name: "the policy asks less than the profile", Code: "policy_malformed", Gate: "bad_evidence_policy", Spoil: func(f *Forger) { f.Policy.Builders = 1 }},
	{Name: "the policy lets authors review themselves", Code: "policy_malformed", Gate: "bad_evidence_policy", Spoil: func(f *Forger) { f.Policy.SelfReview = true }},
	{Name: "subject mismatch, test of another module", Code: "other_module", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, f.Build.Module.SHA256, hash("other bytes"))
	}},
	{Name: "subject mismatch, review of another module", Code: "other_module", Spoil: func(f *Forger) {
		f.Change(review, Bob, f.Build.Module.SHA256, hash("other bytes"))
	}},
	{Name: "the test of another sequence", Code: "other_module", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `"sequence":2`, `"sequence":1`)
	}},
	{Name: "the test of another kernel build", Code: "other_kernel", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, f.Build.BuildID.String(), strings.Repeat("ab", 20))
	}},
	{Name: "the review of another kernel release", Code: "other_kernel", Spoil: func(f *Forger) {
		f.Change(review, Bob, string(Release), "6.1.0-49-cloud-amd64")
	}},
	{Name: "VEX for another kernel", Code: "other_kernel", Spoil: func(f *Forger) {
		f.Change(vex, Analyst, string(Release), "6.1.0-49-cloud-amd64")
	}},
	{Name: "no test", Code: "not_tested", Spoil: func(f *Forger) { delete(f.Files, testResult) }},
	{Name: "a required scenario is missing", Code: "scenario_missing", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, passedScenario(last)+",", "", fmt.Sprintf(`,%q`, last), "")
	}},
	{Name: "a required scenario is passed in one list only", Code: "scenario_missing", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, passedScenario(last)+",", "")
	}},
	{Name: "no scenario replaces the earlier livepatch", Code: "scenario_missing", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `,{"name":"replace-sequence-1","verdict":"pass"}`, "", `,"replace-sequence-1"`, "")
	}},
	{Name: "a scenario that the tester calls required was not passed", Code: "scenario_missing", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `"required":[]`, `"required":["kprobe-on-a-patched-function"]`)
	}},
	{Name: "a failed test is hidden in the scenarios", Code: "test_failed", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, passedScenario(last), strings.Replace(passedScenario(last), "pass", "fail", 1))
	}},
	{Name: "a failed test is hidden in the sum", Code: "test_failed", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `"failedTests":[]`, fmt.Sprintf(`"failedTests":[%q]`, last))
	}},
	{Name: "a failed test that nobody hides", Code: "test_failed", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `"result":"PASSED"`, `"result":"FAILED"`)
	}},
	{Name: "a broken lab is no pass", Code: "test_failed", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `{"name":"boot","verdict":"pass"}`, `{"name":"boot","verdict":"broken"}`)
	}},
	{Name: "a stale test", Code: "too_old", Spoil: func(f *Forger) { f.Older(testResult, Tester, 31) }},
	{Name: "a stale build", Code: "too_old", Spoil: func(f *Forger) { f.Older(provenanceB, BuilderB, 91) }},
	{Name: "a stale review", Code: "too_old", Spoil: func(f *Forger) { f.Older(review, Bob, 91) }},
	{Name: "a stale VEX document", Code: "too_old", Spoil: func(f *Forger) { f.Older(vex, Analyst, 91) }},
	{Name: "a test from the future", Code: "from_the_future", Spoil: func(f *Forger) { f.Older(testResult, Tester, -2) }},
	{Name: "no reviewer", Code: "no_review", Spoil: func(f *Forger) { delete(f.Files, review) }},
	{Name: "one reviewer, who is the author", Code: "self_review", Spoil: func(f *Forger) { f.reviewBy(Alice) }},
	{Name: "one reviewer, who is the author under another address", Code: "self_review", Spoil: func(f *Forger) {
		for _, file := range []string{provenanceA, provenanceB, review} {
			by := map[string]string{provenanceA: BuilderA, provenanceB: BuilderB, review: Bob}[file]
			f.Change(file, by, `alice@example.org`, `robert@example.org`)
		}
	}},
	{Name: "nobody knows the author", Code: "no_author", Spoil: func(f *Forger) {
		for _, file := range []string{provenanceA, provenanceB, review} {
			by := map[string]string{provenanceA: BuilderA, provenanceB: BuilderB, review: Bob}[file]
			f.Change(file, by, `"author":"Alice Example \u003calice@example.org\u003e"`, `"author":""`)
		}
	}},
	{Name: "the review names another author", Code: "review_of_other_sources", Spoil: func(f *Forger) {
		f.Change(review, Bob, `alice@example.org`, `carol@example.org`)
	}},
	{Name: "the review is of other source patches", Code: "review_of_other_sources", Spoil: func(f *Forger) {
		f.Change(review, Bob, `"name":"CVE-2026-0002","sha256":"`, `"name":"CVE-2026-0003","sha256":"`)
	}},
	{Name: "the reviewer said no", Code: "review_rejected", Spoil: func(f *Forger) {
		f.Change(review, Bob, `"decision":"approved"`, `"decision":"rejected"`)
	}},
	{Name: "no VEX document", Code: "no_vex", Spoil: func(f *Forger) { delete(f.Files, vex) }},
	{Name: "VEX malformed, an unknown status", Code: "vex_malformed", Spoil: func(f *Forger) {
		f.Change(vex, Analyst, `"status":"fixed"`, `"status":"mended"`)
	}},
	{Name: "VEX malformed, not affected without a reason", Code: "vex_malformed", Spoil: func(f *Forger) {
		f.Change(vex, Analyst, `"status":"fixed"`, `"status":"not_affected"`)
	}},
	{Name: "VEX malformed, one CVE twice", Code: "vex_malformed", Spoil: func(f *Forger) {
		f.Change(vex, Analyst, `CVE-2026-0002`, `CVE-2026-0001`)
	}},
	{Name: "VEX malformed, no JSON object", Code: "vex_malformed", Spoil: func(f *Forger) {
		head, _, _ := strings.Cut(f.Payload(vex), `"predicate":`)
		f.Files[vex] = Envelope(InToto, head+`"predicate":[]}`+"\n", f.Key(Analyst))
	}},
	{Name: "VEX calls something fixed that is not in the livepatch", Code: "vex_differs", Spoil: func(f *Forger) {
		f.Change(vex, Analyst, `CVE-2026-0002`, `CVE-2026-0009`)
	}},
	{Name: "an extra unknown field in the statement", Code: "statement_malformed", Spoil: func(f *Forger) {
		f.Change(testResult, Tester, `{"_type":`, `{"note":"trust me","_type":`)
	}},
	{Name: "an extra unknown field in the predicate", Code: "statement_malformed", Spoil: func(f *Forger) {
		f.Change(review, Bob, `"decision":`, `"waived":true,"decision":`)
	}},
	{Name: "a member twice", Code: "statement_malformed", Spoil: func(f *Forger) {
		f.Change(review, Bob, `"decision":"approved"`, `"decision":"rejected","decision":"approved"`)
	}},
	{Name: "an extra unknown field in the envelope", Code: "evidence_malformed", Gate: "statement_malformed", Spoil: func(f *Forger) {
		f.Files[vex] = strings.Replace(f.Files[vex], `{"payloadType"`, `{"x":1,"payloadType"`, 1)
	}},
	{Name: "a statement of an unknown kind", Code: "predicate_unknown", Spoil: func(f *Forger) {
		f.Change(review, Bob, "urn:klatch:review:1", "urn:klatch:blessing:1")
	}},
	{Name: "no in-toto statement", Code: "statement_malformed", Spoil: func(f *Forger) {
		f.Change(review, Bob, "https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1")
	}},
	{Name: "two subjects", Code: "statement_malformed", Spoil: func(f *Forger) {
		f.Change(review, Bob, `"subject":[`, `"subject":[{"name":"other.ko","digest":{"sha256":"`+hash("x")+`"}},`)
	}},
	{Name: "a provenance by no builder of ours", Code: "statement_malformed", Spoil: func(f *Forger) {
		f.Change(provenanceB, BuilderB, "urn:klatch:builder:"+BuilderB, "https://example.org/"+BuilderB)
	}},
}
