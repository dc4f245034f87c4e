// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"

	"klatch/internal/cve"
	"klatch/internal/durable"
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
