// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"encoding/json"
	"fmt"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/proof"
	"klatch/internal/livepatch"
)

// tested is what a statement takes from a test's result, in the words of
// test.json (docs/reference/build.md), whose members are only added.
type tested struct {
	ModuleSHA256 string   `json:"module_sha256"`
	BuildID      string   `json:"build_id"`
	Required     []string `json:"required"`
	Scenarios    []struct {
		Name     string    `json:"name"`
		Verdict  string    `json:"verdict"`
		Digest   string    `json:"digest"`
		Rig      string    `json:"rig"`
		Hardware bool      `json:"hardware"`
		Finished time.Time `json:"finished"`
	} `json:"scenarios"`
	Fixes []livepatch.Fix `json:"fixes"`
}

// Test signs how a build was tried, whatever the verdict. at is when the test
// ended; a result that was kept and is older says so by its scenarios.
func Test(k evidence.PrivateKey, b build.Result, r proof.Result, at time.Time) (evidence.Envelope, error) {
	var t tested
	raw, err := json.Marshal(r)
	if err != nil {
		return evidence.Envelope{}, err
	}
	if err := json.Unmarshal(raw, &t); err != nil {
		return evidence.Envelope{}, fmt.Errorf("read test result: %w", err)
	}
	if t.ModuleSHA256 != b.Module.SHA256 || t.BuildID != b.BuildID.String() {
		return evidence.Envelope{}, fault.New(fault.Internal, "other_module", "the test result is for another module than sequence %d of %s", b.Sequence, b.Kernel)
	}
	out := evidence.Tried{Tester: k.Name, Kernel: b.KernelBuild(), Sequence: b.Sequence, Finished: at,
		Required: append([]string{}, t.Required...), Scenarios: []evidence.Scenario{}, Fixes: t.Fixes}
	for _, s := range t.Scenarios {
		out.Scenarios = append(out.Scenarios, evidence.Scenario{Name: s.Name, Verdict: s.Verdict, Digest: s.Digest, Rig: s.Rig, Hardware: s.Hardware, Finished: s.Finished})
		if !s.Finished.IsZero() && s.Finished.Before(out.Finished) {
			out.Finished = s.Finished // the statement is as old as its oldest scenario
		}
	}
	if string(r.Verdict) != "pass" && len(out.Scenarios) == 0 {
		out.Scenarios = append(out.Scenarios, evidence.Scenario{Name: "start", Verdict: string(r.Verdict)})
	}
	return evidence.Sign(About(b).Module, evidence.NewTestResult(out), k)
}
