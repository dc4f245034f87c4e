// SPDX-License-Identifier: Apache-2.0

package attest_test

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/trust"
)

// TestANewPolicyAsksForEveryStoryThatIsAlwaysPlayed: the list in package
// evidence is that of the lab.
func TestANewPolicyAsksForEveryStoryThatIsAlwaysPlayed(t *testing.T) {
	ours, err := proof.Ours()
	if err != nil {
		t.Fatal(err)
	}
	var always []string
	for _, s := range ours {
		if s.Story.Required && s.Story.Each == "" && len(s.Story.Needs) == 0 {
			always = append(always, s.Story.Name)
		}
	}
	slices.Sort(always)
	if !slices.Equal(always, evidence.BaseScenarios) {
		t.Errorf("always played: %v, asked for: %v", always, evidence.BaseScenarios)
	}
}

// TestAStatementSaysWhatTheTestFound: names, rigs, digests and what was
// required reach the statement; it is as old as its oldest scenario.
func TestAStatementSaysWhatTheTestFound(t *testing.T) {
	now := evidence.At(time.Now())
	d, err := datadir.Make(t.TempDir(), datadir.Policy{Publisher: "example.org", Profile: trust.Lab})
	if err != nil {
		t.Fatal(err)
	}
	if err := attest.MakeKeys(d); err != nil {
		t.Fatal(err)
	}
	b, plan, err := evidencesim.Built(d, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := evidencesim.Attested(d, b, plan, now); err != nil {
		t.Fatal(err)
	}
	p, err := attest.ReadPolicy(d)
	if err != nil {
		t.Fatal(err)
	}
	p.Required = []string{"reboot"}
	if err := attest.WritePolicy(d, p); err != nil {
		t.Fatal(err)
	}
	k, err := attest.Key(d, evidence.Tester, "")
	if err != nil {
		t.Fatal(err)
	}
	r := proof.Result{Verdict: lab.Pass, ModuleSHA256: b.Module.SHA256, BuildID: b.BuildID.String(), Required: []string{"mine"},
		Fixes: []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Passed}},
		Scenarios: []proof.Scenario{
			{Name: "reboot", Verdict: lab.Pass, Digest: "d1", Rig: "qemu", Finished: now.Add(-time.Hour)},
			{Name: "reboot", Verdict: lab.Pass, Digest: "d2", Rig: "board one", Hardware: true, Finished: now},
			{Name: "mine", Verdict: lab.Pass, Rig: "qemu", Finished: now},
		}}
	said := func(r proof.Result) (evidence.Report, error) {
		t.Helper()
		e, err := attest.Test(k, b, r, now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attest.Put(filepath.Dir(b.Module.Path), evidence.Tester, k.Name, e); err != nil {
			t.Fatal(err)
		}
		_, rep, err := attest.Gate(d, b, nil, now)
		return rep, err
	}
	rep, err := said(r)
	if err != nil {
		t.Fatal(err)
	}
	want := []evidence.Scenario{
		{Name: "reboot", Verdict: "pass", Digest: "d1", Rig: "qemu", Finished: now.Add(-time.Hour)},
		{Name: "reboot", Verdict: "pass", Digest: "d2", Rig: "board one", Hardware: true, Finished: now},
		{Name: "mine", Verdict: "pass", Rig: "qemu", Finished: now},
	}
	if !slices.Equal(rep.Scenarios, want) || !rep.Hardware || rep.Fixes[0].Check != livepatch.Passed {
		t.Errorf("%+v", rep)
	}
	r.Scenarios[1].Verdict = lab.Fail
	if _, err := said(r); fault.CodeOf(err) != "test_failed" {
		t.Errorf("failed on a board, passed in a machine: %v", err)
	}
	r.Scenarios = r.Scenarios[:1]
	if _, err := said(r); fault.CodeOf(err) != "scenario_missing" {
		t.Errorf("the tester's own requirement: %v", err)
	}
	r.Scenarios[0].Finished = now.Add(-31 * 24 * time.Hour)
	r.Required = nil
	if _, err := said(r); fault.CodeOf(err) != "too_old" {
		t.Errorf("a scenario that was kept for a month: %v", err)
	}
}
