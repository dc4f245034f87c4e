// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

const testType = "https://in-toto.io/attestation/test-result/v0.1"

// The words of test-result 0.1.
const (
	passed = "PASSED"
	failed = "FAILED"
)

// TestResult says how one livepatch was tried on its kernel, in the form of
// in-toto's test-result 0.1. Result is the sum of the scenarios; the check
// looks at each.
type TestResult struct {
	Result        string   `json:"result"`
	Configuration []Trial  `json:"configuration"`
	Passed        []string `json:"passedTests"`
	Failed        []string `json:"failedTests"` // broken ones too: they are not passed
}

// Trial is the one entry of the configuration: a ResourceDescriptor with our
// annotations.
type Trial struct {
	Name        string `json:"name"`
	Annotations Tried  `json:"annotations"`
}

// Tried is what was tried, by whom, on what.
type Tried struct {
	Tester    string             `json:"tester"`
	Kernel    kernel.Build       `json:"kernel"`
	Sequence  livepatch.Sequence `json:"sequence"`
	Finished  time.Time          `json:"finished"`
	Required  []string           `json:"required"` // scenarios that this livepatch had to pass, by the tester's word
	Scenarios []Scenario         `json:"scenarios"`
	Fixes     []livepatch.Fix    `json:"fixes"`
}

// Scenario is one story and how it ended.
type Scenario struct {
	Name     string    `json:"name"`
	Verdict  string    `json:"verdict"`            // pass, fail or broken
	Digest   string    `json:"digest,omitempty"`   // of what was run: SHA-256
	Rig      string    `json:"rig,omitempty"`      // such as qemu
	Hardware bool      `json:"hardware,omitempty"` // on a real machine
	Finished time.Time `json:"finished,omitzero"`
}

const trialName = "trial"

// NewTestResult is the statement of one tester; the lists follow from the
// scenarios.
func NewTestResult(t Tried) *TestResult {
	t.Finished = At(t.Finished)
	r := &TestResult{Result: passed, Configuration: []Trial{{trialName, t}}, Passed: []string{}, Failed: []string{}}
	for i, s := range t.Scenarios {
		if !s.Finished.IsZero() {
			t.Scenarios[i].Finished = At(s.Finished)
		}
		if s.Verdict == "pass" {
			if !slices.Contains(r.Passed, s.Name) { // on another rig
				r.Passed = append(r.Passed, s.Name)
			}
			continue
		}
		r.Failed, r.Result = append(r.Failed, s.Name), failed
	}
	return r
}

func (r *TestResult) tried() Tried { return r.Configuration[0].Annotations }

func (r *TestResult) role() Role { return Tester }

func (r *TestResult) claim() claim {
	t := r.tried()
	return claim{t.Tester, t.Finished, t.Kernel, t.Sequence}
}

func (r *TestResult) check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Untrusted, "", "test result: "+format, args...)
	}
	if len(r.Configuration) != 1 || r.Configuration[0].Name != trialName {
		return bad("%d configurations, want one called %s", len(r.Configuration), trialName)
	}
	if r.Result != passed && r.Result != failed {
		return bad("result %.40q", r.Result)
	}
	type key struct{ name, rig string }
	seen := map[key]bool{}
	for _, s := range r.tried().Scenarios {
		if s.Name == "" || seen[key{s.Name, s.Rig}] {
			return bad("scenario %.60q is listed twice for one rig or has no name", s.Name)
		}
		seen[key{s.Name, s.Rig}] = true
	}
	return nil
}

// trouble names what did not pass, whichever part of the statement admits it.
func (r *TestResult) trouble() []string {
	bad := slices.Clone(r.Failed)
	for _, s := range r.tried().Scenarios {
		if s.Verdict != "pass" && !slices.Contains(bad, s.Name) {
			bad = append(bad, s.Name)
		}
	}
	if len(bad) == 0 && r.Result != passed {
		bad = append(bad, "the whole test")
	}
	return bad
}

// passes says whether a scenario is there and passed, in both lists.
func (r *TestResult) passes(name string) bool {
	return slices.Contains(r.Passed, name) && slices.ContainsFunc(r.tried().Scenarios, func(s Scenario) bool {
		return s.Name == name && s.Verdict == "pass"
	})
}
