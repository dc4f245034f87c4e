// SPDX-License-Identifier: Apache-2.0

package rolloutrepo_test

import (
	"testing"

	"klatch/internal/rollout"
	. "klatch/internal/server/rolloutrepo"
)

// A machine without the operator's anchor is offered what its tier is to run.
func TestOfferFollowsTheTier(t *testing.T) {
	t.Parallel()
	s := newServer(t, rollout.Lab)
	one := s.release(stock, 1)
	want := func(canary, stable bool) {
		t.Helper()
		if s.Offered("canary", one) != canary || s.Offered("stable", one) != stable || s.Offered("nobody", one) {
			t.Errorf("canary %t, stable %t", s.Offered("canary", one), s.Offered("stable", one))
		}
	}
	want(true, false)
	s.open() // before the first Update
	want(true, false)
	s.update()
	if _, err := s.promote(Promotion{Tier: "stable", All: true, Urgent: true}); err != nil {
		t.Fatal(err)
	}
	want(true, true)
	if err := s.Hold(t.Context(), "anna", "canary", "freeze", s.now); err != nil {
		t.Fatal(err)
	}
	want(false, true)
}
