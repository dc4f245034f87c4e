// SPDX-License-Identifier: Apache-2.0

package evidence_test

import (
	"maps"
	"slices"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/evidence"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/trust"
)

func TestMain(m *testing.M) {
	defer evidencesim.Remove()
	m.Run()
}

// verdict is what the check says of a forger's evidence.
func verdict(f *evidencesim.Forger) error {
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
	now := time.Now()
	_, err = evidence.Check(p, evidence.Facts{About: attest.About(f.Build), Signed: now, Now: now, Earlier: []livepatch.Sequence{1}}, all)
	return err
}

// TestAttacksOnTheCheck are those of cmd/klatch-forge's TestAttack without the
// program around: quick enough to run once for every line that is taken out
// (tools/mutate).
func TestAttacksOnTheCheck(t *testing.T) {
	if err := verdict(evidencesim.NewForger(t)); err != nil {
		t.Fatalf("good evidence: %v", err)
	}
	for _, a := range evidencesim.Attacks {
		t.Run(a.Name, func(t *testing.T) {
			f := evidencesim.NewForger(t)
			a.Spoil(f)
			if code := fault.CodeOf(verdict(f)); code != a.Code && (code == "" || code != a.Gate) {
				t.Errorf("code %q, want %q", code, a.Code)
			}
		})
	}
}
