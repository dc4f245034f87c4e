// SPDX-License-Identifier: Apache-2.0

package evidence_test

import (
	"maps"
	"slices"
	"testing"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/trust"
)

func TestMain(m *testing.M) {
	defer evidencesim.Remove()
	m.Run()
}

// facts are those of the good evidence.
func facts(f *evidencesim.Forger) evidence.Facts {
	now := time.Now()
	return evidence.Facts{About: attest.About(f.Build), Signed: now, Now: now, Earlier: []livepatch.Sequence{1}}
}

// verdict is what the check says of a forger's evidence.
func verdict(f *evidencesim.Forger, known evidence.Facts) error {
	p, err := evidence.ParsePolicy(f.PolicyText(), trust.Full)
	if err != nil {
		return err
	}
	var all []evidence.Envelope
	for _, name := range slices.Sorted(maps.Keys(f.Files)) {
		e, err := evidence.ParseEnvelope([]byte(f.Files[name]))
		if err != nil {
			return err
		}
		all = append(all, e)
	}
	_, err = evidence.Check(p, known, all)
	return err
}

// TestAttacksOnTheCheck are those of cmd/klatch-forge's TestAttack without the
// program around: quick enough to run once for every line that is taken out
// (tools/mutate).
func TestAttacksOnTheCheck(t *testing.T) {
	good := evidencesim.NewForger(t)
	if err := verdict(good, facts(good)); err != nil {
		t.Fatalf("good evidence: %v", err)
	}
	for _, a := range evidencesim.Attacks {
		t.Run(a.Name, func(t *testing.T) {
			f := evidencesim.NewForger(t)
			a.Spoil(f)
			if code := fault.CodeOf(verdict(f, facts(f))); code != a.Code && (code == "" || code != a.Gate) {
				t.Errorf("code %q, want %q", code, a.Code)
			}
		})
	}
}

// TestTheManifestSaysNoMoreThanTheEvidence, and nothing was signed tomorrow.
func TestTheManifestSaysNoMoreThanTheEvidence(t *testing.T) {
	f := evidencesim.NewForger(t)
	for code, change := range map[fault.Code]func(*evidence.Facts){
		"":                 func(*evidence.Facts) {},
		"functions_differ": func(k *evidence.Facts) { k.Manifest.Functions[0].Name = "g" },
		"fixes_differ":     func(k *evidence.Facts) { k.Manifest.Fixes[1].Check = livepatch.Passed },
		"from_the_future":  func(k *evidence.Facts) { k.Signed = k.Now.Add(time.Hour) },
	} {
		k := facts(f)
		k.Manifest = &livepatch.Manifest{Functions: slices.Clone(f.Build.Functions), Fixes: evidencesim.Tested(f.Build).Fixes}
		change(&k)
		if got := fault.CodeOf(verdict(f, k)); got != code {
			t.Errorf("code %q, want %q", got, code)
		}
	}
}
