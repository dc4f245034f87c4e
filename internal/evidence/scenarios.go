// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"fmt"
	"slices"

	"klatch/internal/livepatch"
)

// BaseScenarios are the stories that every livepatch goes through, whatever it
// fixes (lab/scenarios). A new policy asks for them; what else a livepatch
// needs, the tester says.
var BaseScenarios = []string{"busy-machine", "cancel", "load-and-disable", "reboot"}

// replaceScenario is the story in which a livepatch replaces an earlier one.
func replaceScenario(s livepatch.Sequence) string { return fmt.Sprintf("replace-sequence-%d", s) }

// required lists what a livepatch must have passed: what the policy asks of
// all, what the tester says this one needed, and one story for each earlier
// livepatch that machines may have loaded. A tester can add and not leave out.
func (p Policy) required(earlier []livepatch.Sequence, t Tried) []string {
	all := slices.Concat(p.Required, t.Required)
	for _, s := range earlier {
		all = append(all, replaceScenario(s))
	}
	slices.Sort(all)
	return slices.Compact(all)
}
