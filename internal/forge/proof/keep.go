// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
)

const resultFile = "test.json"

// RunsDir is where the runs of a build are kept.
func RunsDir(buildDir string) string { return filepath.Join(buildDir, "runs") }

// Keep writes the result of a whole trial beside the build. What another rig
// found out about the same module stays in it.
func Keep(buildDir string, r Result) error {
	if other, err := Load(buildDir); err == nil && other.Version == ResultVersion && other.ModuleSHA256 == r.ModuleSHA256 && other.BuildID == r.BuildID {
		r = merge(other, r)
	}
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(buildDir, resultFile), append(b, '\n'), 0o644)
}

// merge adds what was played on other rigs than those of the new result.
func merge(old, r Result) Result {
	rigs := map[string]bool{}
	for _, s := range r.Scenarios {
		rigs[s.Rig] = true
	}
	var fixes []cve.ID
	checked := map[cve.ID]bool{}
	for _, f := range append(slices.Clone(old.Fixes), r.Fixes...) {
		if !slices.Contains(fixes, f.CVE) {
			fixes = append(fixes, f.CVE)
		}
		checked[f.CVE] = checked[f.CVE] || f.Check == livepatch.Passed
	}
	for _, s := range old.Scenarios {
		if !rigs[s.Rig] {
			r.Scenarios = append(r.Scenarios, s)
		}
	}
	r.settle(fixes, func(id cve.ID) bool { return checked[id] })
	return r
}

// Load reads the result beside a build, whatever it says.
func Load(buildDir string) (Result, error) {
	var r Result
	b, err := durable.ReadFile(filepath.Join(buildDir, resultFile), maxJSON)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read test result: %w", err)
	}
	return r, nil
}

// Read returns the result for one module, which must be a pass for exactly
// these bytes, with every required scenario.
func Read(buildDir string, built build.Result) (Result, error) {
	r, err := Load(buildDir)
	refuse := func(code fault.Code, format string, args ...any) error {
		return fault.New(fault.Denied, code, format, args...).WithHint("klatch-forge test --kernel %s", built.Kernel)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return r, refuse("not_tested", "sequence %d of %s was not tested", built.Sequence, built.Kernel)
	case err != nil:
		return r, err
	case r.Version != ResultVersion:
		return r, refuse("not_tested", "the test result of sequence %d of %s has version %d, want %d", built.Sequence, built.Kernel, r.Version, ResultVersion)
	case r.ModuleSHA256 != built.Module.SHA256 || r.BuildID != built.BuildID.String():
		return r, refuse("not_tested", "the test result is for another module than sequence %d of %s", built.Sequence, built.Kernel)
	case r.Verdict != lab.Pass:
		return r, fault.New(fault.Denied, "test_failed", "the test of sequence %d of %s ended %s", built.Sequence, built.Kernel, r.Verdict).
			WithHint("look at %s", filepath.Join(buildDir, resultFile))
	case judge(r.Required, r.Scenarios) != lab.Pass:
		return r, refuse("not_tested", "the test result of sequence %d of %s says pass, and its scenarios do not", built.Sequence, built.Kernel)
	}
	return r, nil
}
