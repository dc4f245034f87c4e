// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/rollout"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

func TestMain(m *testing.M) {
	code := m.Run()
	evidencesim.Remove()
	os.Exit(code)
}

// listed is a signed list in memory.
type listed struct {
	oneTarget
	files map[string][]byte
	lost  string // signed, and not served
}

func (l listed) paths() []string {
	var all []string
	for p := range l.files {
		all = append(all, p)
	}
	return all
}

func (l listed) EvidencePolicy() string { return evidence.NewestPolicy(l.paths()) }

func (l listed) Beside(target string) []string {
	return slices.DeleteFunc(l.paths(), func(p string) bool { return path.Dir(p) != path.Dir(target) })
}

func (l listed) Named(target string) (Listed, error) {
	b, ok := l.files[target]
	if !ok {
		return Listed{}, fault.New(fault.NotFound, "target_missing", "%s is not listed", target)
	}
	return Listed{Target: rollout.Target{Path: target, Bytes: int64(len(b)), SHA256: digestOf(b)}}, nil
}

func (l listed) Fetch(_ context.Context, target string, _ int64) ([]byte, error) {
	if target == l.lost {
		return nil, fault.New(fault.Unavailable, "target_missing", "%s is signed, and the server does not have it", target)
	}
	b, ok := l.files[target]
	if !ok {
		return nil, fault.New(fault.NotFound, "target_missing", "%s is not listed", target)
	}
	return b, nil
}

// asked is a trial of sequence 2 that has come as far as the evidence.
func asked(t *testing.T, f *evidencesim.Forger, rule EvidenceRule) (*trial, listed) {
	t.Helper()
	l := listed{files: map[string][]byte{}}
	p := f.Good()
	for _, target := range p.Targets {
		l.files[target.Path] = target.Content
	}
	b, err := os.ReadFile(f.Dir.Anchor())
	if err != nil {
		t.Fatal(err)
	}
	anchor, err := trust.ParseAnchor(b, true)
	if err != nil {
		t.Fatal(err)
	}
	a, err := New(Config{Dir: t.TempDir(), Policy: DefaultPolicy(), Evidence: rule, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	tr := &trial{Agent: a, anchor: anchor, basis: basisOf(anchor), snapshot: l, start: time.Now(),
		offer: wire.Offer{Target: p.Target("klatch_2.lpb").Path, Sequence: 2}}
	if tr.bundle, err = livepatch.ParseBundle(l.files[tr.offer.Target]); err != nil {
		t.Fatal(err)
	}
	if tr.manifest, err = anchor.OpenManifest(tr.bundle.Manifest); err != nil {
		t.Fatal(err)
	}
	return tr, l
}

// TestAttackEvidence: what the publisher's gate and a stranger refuse, a
// machine refuses too, with the same code, and it says at which class.
func TestAttackEvidence(t *testing.T) {
	t.Run("good evidence", func(t *testing.T) {
		for _, rule := range []EvidenceRule{"", EvidencePublished, EvidenceRequired} {
			tr, _ := asked(t, evidencesim.NewForger(t), rule)
			if err := tr.checkEvidence(t.Context()); err != nil {
				t.Errorf("%q: %v", rule, err)
			}
			if seen := tr.journal().Evidence; seen == nil || seen.Version != evidence.PolicyVersion(tr.snapshot.EvidencePolicy()) {
				t.Errorf("%q: remembered %+v", rule, seen)
			}
		}
	})
	for _, a := range evidencesim.Attacks {
		t.Run("Attack/A/"+a.Name, func(t *testing.T) {
			f := evidencesim.NewForger(t)
			a.Spoil(f)
			tr, _ := asked(t, f, EvidencePublished)
			err := at(StepEvidence, tr.checkEvidence(t.Context()))
			if fault.CodeOf(err) != a.Code {
				t.Fatalf("%v, want %s", err, a.Code)
			}
			if tr.journal().Evidence != nil {
				t.Error("its policy is remembered")
			}
			if hint := fault.HintOf(err); strings.Contains(hint, "klatch-forge") || !strings.Contains(hint, "publisher") {
				t.Errorf("a machine's owner is told: %s", hint)
			}
		})
	}
}

// TestAttackEvidenceIsMissing: whoever serves or lists the files cannot make
// the question go away.
func TestAttackEvidenceIsMissing(t *testing.T) {
	for _, tt := range []struct {
		name  string
		rule  EvidenceRule
		spoil func(*trial, listed)
		code  fault.Code
		class Class
	}{
		{"nothing beside it", EvidencePublished, func(tr *trial, l listed) { delete(l.files, evidencePath(tr)) }, "no_evidence", Quarantine},
		{"of another livepatch", EvidencePublished, func(tr *trial, l listed) {
			other, _ := evidence.TargetPath(path.Dir(tr.offer.Target) + "/klatch_1.lpb")
			l.files[evidencePath(tr)] = l.files[other]
		}, "other_module", Quarantine},
		{"listed and not served", EvidencePublished, func(tr *trial, l listed) { tr.snapshot = listed{files: l.files, lost: evidencePath(tr)} }, "target_missing", Stay},
		{"the policy is listed and not served", EvidencePublished, func(tr *trial, l listed) { tr.snapshot = listed{files: l.files, lost: l.EvidencePolicy()} }, "target_missing", Stay},
		{"the policy is garbage", EvidencePublished, func(_ *trial, l listed) { l.files[l.EvidencePolicy()] = []byte("{}\n") }, "policy_malformed", Stay},
		{"the policy has another's name", EvidencePublished, func(_ *trial, l listed) { l.files["policy/evidence.99.json"] = l.files[l.EvidencePolicy()] }, "policy_malformed", Stay},
		{"the policy is gone", EvidencePublished, func(tr *trial, l listed) {
			if err := tr.sawPolicy(1); err != nil {
				t.Fatal(err)
			}
			delete(l.files, l.EvidencePolicy())
		}, codeEvidenceBack, Stay},
		{"an older policy", EvidencePublished, func(tr *trial, l listed) {
			if err := tr.sawPolicy(evidence.PolicyVersion(l.EvidencePolicy()) + 1); err != nil {
				t.Fatal(err)
			}
		}, codeEvidenceBack, Stay},
		{"no policy, and evidence is required", EvidenceRequired, func(_ *trial, l listed) { delete(l.files, l.EvidencePolicy()) }, "no_policy", Stay},
		{"no policy, and evidence is not required", EvidencePublished, func(_ *trial, l listed) { delete(l.files, l.EvidencePolicy()) }, "", ""},
		{"another publisher's policy was newer", EvidencePublished, func(tr *trial, _ listed) {
			own := tr.basis
			tr.basis = "another"
			if err := tr.sawPolicy(99); err != nil {
				t.Fatal(err)
			}
			tr.basis = own
		}, "", ""},
	} {
		name := tt.name
		if tt.code != "" {
			name = "Attack/A/" + name
		}
		t.Run(name, func(t *testing.T) {
			tr, l := asked(t, evidencesim.NewForger(t), tt.rule)
			tt.spoil(tr, l)
			err := at(StepEvidence, tr.checkEvidence(t.Context()))
			class := Class("")
			if err != nil {
				_, class = placeOf(err)
			}
			if fault.CodeOf(err) != tt.code || class != tt.class {
				t.Errorf("%v (%s), want %s (%s)", err, class, tt.code, tt.class)
			}
		})
	}
}

func evidencePath(tr *trial) string {
	p, _ := evidence.TargetPath(tr.offer.Target)
	return p
}

// TestOtherEvidenceEndsAQuarantine: the record of a refused livepatch holds
// what was read beside it.
func TestOtherEvidenceEndsAQuarantine(t *testing.T) {
	tr, l := asked(t, evidencesim.NewForger(t), EvidencePublished)
	digest := func() string {
		d, err := tr.signedDigests()
		if err != nil {
			t.Fatal(err)
		}
		return d.Evidence
	}
	before := digest()
	l.files[evidencePath(tr)] = append(l.files[evidencePath(tr)], ' ')
	other := digest()
	policy := l.EvidencePolicy()
	l.files[policy] = append(l.files[policy], ' ')
	if third := digest(); before == other || other == third || before == "" {
		t.Errorf("%q, with other evidence %q, with another policy %q", before, other, third)
	}
	delete(l.files, evidencePath(tr))
	if gone := digest(); gone == "" || gone == before {
		t.Errorf("without evidence %q", gone)
	}
	delete(l.files, policy)
	if none := digest(); none != "" {
		t.Errorf("without a policy %q", none)
	}
}
