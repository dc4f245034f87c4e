// SPDX-License-Identifier: Apache-2.0

package agent_test

import "testing"

// TestAttackJourneys are journeys that are cases of the attack catalog too.
func TestAttackJourneys(t *testing.T) {
	t.Run("Attack/L/stuck transition", TestAStalledTransitionIsCanceledAndTriedAgain)
	t.Run("Attack/L/trouble during the soak", TestTroubleDuringTheSoakMakesItSuspect)
	t.Run("Attack/L/finit_module refused", TestARefusedLivepatchIsNotTriedAgain)
}
