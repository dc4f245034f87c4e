// SPDX-License-Identifier: Apache-2.0

package rollout_test

import (
	"fmt"
	"strings"
	"testing"

	"klatch/internal/fault"
	. "klatch/internal/rollout"
)

func names(t Tiers) string {
	var out []string
	for _, x := range t.Tiers {
		out = append(out, fmt.Sprintf("%s:%d", x.Name, x.SoakHours))
	}
	return strings.Join(out, " ")
}

func TestTiersAreAddedMovedAndRemoved(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func() (Tiers, error)
		want string
		code fault.Code
	}{
		{"one at the end", func() (Tiers, error) { return three.Add(Tier{"late", 100}, 99) }, "canary:0 early:24 stable:72 late:100", ""},
		{"one in between", func() (Tiers, error) { return three.Add(Tier{"half", 12}, 1) }, "canary:0 half:12 early:24 stable:72", ""},
		{"one at the front, which then waits for nothing", func() (Tiers, error) { return three.Add(Tier{"lab", 5}, 0) }, "lab:0 canary:0 early:24 stable:72", ""},
		{"one that is there", func() (Tiers, error) { return three.Add(Tier{"early", 5}, 0) }, "", "tier_exists"},
		{"one with a bad name", func() (Tiers, error) { return three.Add(Tier{"A b", 5}, 9) }, "", "bad_tiers"},
		{"one with a bad soak", func() (Tiers, error) { return three.Add(Tier{"late", -5}, 9) }, "", "bad_tiers"},
		{"the last to the front", func() (Tiers, error) { return three.Move("stable", 0) }, "stable:0 canary:0 early:24", ""},
		{"the first to the end", func() (Tiers, error) { return three.Move("canary", 2) }, "early:0 stable:72 canary:0", ""},
		{"nowhere", func() (Tiers, error) { return three.Move("nobody", 2) }, "", "no_tier"},
		{"another soak", func() (Tiers, error) { return three.Soaks("early", 48) }, "canary:0 early:48 stable:72", ""},
		{"a soak for the first", func() (Tiers, error) { return three.Soaks("canary", 48) }, "", "first_tier_soaks"},
		{"the first out", func() (Tiers, error) { return three.Remove("canary") }, "early:0 stable:72", ""},
		{"one that is not there out", func() (Tiers, error) { return three.Remove("nobody") }, "", "no_tier"},
		{"the only one out", func() (Tiers, error) { return Tiers{TiersFormat, three.Tiers[:1]}.Remove("canary") }, "", "last_tier"},
	} {
		got, err := tt.do()
		if fault.CodeOf(err) != tt.code || tt.code == "" && names(got) != tt.want {
			t.Errorf("%s: %s, %v", tt.name, names(got), err)
		}
	}
	if names(three) != "canary:0 early:24 stable:72" {
		t.Errorf("the old list was changed: %s", names(three))
	}
}
