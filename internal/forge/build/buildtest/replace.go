// SPDX-License-Identifier: Apache-2.0

package buildtest

import (
	"fmt"
	"slices"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
)

// Replace loads the newest of some built livepatches over each of the others,
// which may come from other drivers: exactly one must be enabled then, and the
// one that was replaced must unload. check is a program that ends with status
// 1 where no livepatch is loaded and with 0 where one is; all of them must
// name its CVE.
func Replace(t *testing.T, rig lab.Rig, image string, chain []build.Result, id cve.ID, check []byte) {
	t.Helper()
	last := len(chain) - 1
	res, err := proof.Run(t.Context(), proof.Trial{Rig: rig, Kernel: image, Built: chain[last], Earlier: chain[:last],
		Checks: map[cve.ID][]byte{id: check}, Only: []string{"replace"}})
	if err != nil {
		t.Fatal(err)
	}
	if v := proof.Worst(res.Scenarios); v != lab.Pass || len(res.Trouble) != 0 {
		t.Errorf("verdict %s; trouble %+v", v, res.Trouble)
	}
	for _, b := range chain[:last] {
		name := fmt.Sprintf("replace-sequence-%d", b.Sequence)
		if !slices.ContainsFunc(res.Scenarios, func(s proof.Scenario) bool { return s.Name == name && s.Verdict == lab.Pass }) {
			t.Errorf("%s did not pass", name)
		}
	}
	for _, s := range res.Scenarios {
		t.Logf("%-6s %-28s %5.1f s  %s", s.Verdict, s.Name, s.Seconds, s.Why)
	}
}
