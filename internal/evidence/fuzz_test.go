// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"testing"

	"klatch/internal/trust"
)

// FuzzParsePolicy: a policy that is taken promises what its profile does, and
// is in its one form.
func FuzzParsePolicy(f *testing.F) {
	for _, profile := range []trust.Profile{trust.Lab, trust.Small, trust.Full} {
		p := DefaultPolicy(profile, BaseScenarios)
		k, err := NewKey("bob", Roles...)
		if err != nil {
			f.Fatal(err)
		}
		p.Signers = []Signer{k.Signer()}
		if b, err := p.Encode(); err == nil {
			f.Add(b)
		}
	}
	f.Add([]byte("null\n"))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, profile := range []trust.Profile{trust.Lab, trust.Small, trust.Full} {
			p, err := ParsePolicy(b, profile)
			if err != nil {
				continue
			}
			if profile != trust.Lab && (p.Builders < 1 || p.Reviewers < 1 || p.SelfReview) {
				t.Errorf("profile %s with %+v", profile, p)
			}
			if again, err := p.Encode(); err != nil || !bytes.Equal(again, b) {
				t.Errorf("another form: %v\n%s\n%s", err, b, again)
			}
		}
	})
}

// FuzzParseFile: an evidence file that is taken is in its one form.
func FuzzParseFile(f *testing.F) {
	f.Add([]byte(`{"format":"klatch-evidence/1","statements":[]}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseFile(b)
		if err != nil {
			return
		}
		if again, err := e.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("another form: %v\n%s\n%s", err, b, again)
		}
	})
}
