// SPDX-License-Identifier: Apache-2.0

package publish_test

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/audit"
	"klatch/internal/forge/build"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// TestRecallWithdrawsForGood: what was recalled leaves the list, and no later
// publication brings it back.
func TestRecallWithdrawsForGood(t *testing.T) {
	d := folder(t, trust.Small)
	var builds []build.Result
	for seq := livepatch.Sequence(1); seq <= 2; seq++ {
		b := built(t, d, seq)
		if _, err := sign.Sign(d, b, now); err != nil {
			t.Fatal(err)
		}
		builds = append(builds, b)
	}
	if _, err := publish.Publish(t.Context(), d, builds, now); err != nil {
		t.Fatal(err)
	}
	listed := func() (all []string) {
		s, err := tufrepo.Look(d.Repository())
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range s.Roles {
			for _, name := range r.Targets {
				if strings.HasSuffix(name, ".lpb") || livepatch.RecallsVersion(name) > 0 {
					all = append(all, name)
				}
			}
		}
		slices.Sort(all)
		return all
	}
	take := func(r *livepatch.Recalls) {
		if r.Check(builds[1].BuildID, 2) == nil {
			r.Entries = append(r.Entries, livepatch.Recall{Kernel: builds[1].BuildID, Sequence: 2, Reason: "it eats files"})
		}
	}
	r, _, err := publish.Recall(t.Context(), d, take, now)
	if err != nil || r.Version != 1 {
		t.Fatal(r, err)
	}
	want := []string{"debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb", "policy/recalls-1.note"}
	if got := listed(); !slices.Equal(got, want) {
		t.Errorf("listed %q", got)
	}
	again, res, err := publish.Recall(t.Context(), d, take, now)
	if err != nil || again.Version != 1 || res.Changed {
		t.Errorf("the same again: %+v, %+v, %v", again, res, err)
	}
	if _, err := publish.Publish(t.Context(), d, builds, now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := listed(); !slices.Equal(got, want) {
		t.Errorf("after another publication: %q", got)
	}
	if _, _, err := publish.Recall(t.Context(), d, func(r *livepatch.Recalls) { r.Entries = r.Entries[:0] }, now); fault.CodeOf(err) != "recalls_shrink" {
		t.Errorf("taking a recall back: %v", err)
	}
	r, _, err = publish.Recall(t.Context(), d, func(r *livepatch.Recalls) {
		r.Floors = append(r.Floors, livepatch.Floor{Kernel: builds[0].BuildID, Sequence: 3})
	}, now)
	if got := listed(); err != nil || r.Version != 2 || !slices.Equal(got, []string{"policy/recalls-2.note"}) {
		t.Errorf("with a floor: %q, %v", got, err)
	}
}

// TestWhetherItIsRecalledMustBeKnown: a published target that says of itself
// what this program cannot read stops a recall, rather than stay published.
func TestWhetherItIsRecalledMustBeKnown(t *testing.T) {
	for name, custom := range map[string]string{
		"another version":   `{"format":"klatch-target/2","kernel":{},"sequence":1}`,
		"another type":      `{"format":"klatch-target/1","kernel":"6.1","sequence":1}`,
		"no kernel build":   `{"format":"klatch-target/1","sequence":1}`,
		"nothing in it":     `{}`,
		"not even a record": `7`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := folder(t, trust.Lab)
			b := built(t, d, 1)
			keys, err := sign.RepositoryKeys(d, sign.All)
			if err != nil {
				t.Fatal(err)
			}
			p := tufrepo.Publication{Targets: []tufrepo.Target{{Path: "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb", Content: []byte("1"), Custom: json.RawMessage(custom)}}}
			if _, err := tufrepo.Publish(t.Context(), d.Repository(), p, keys, now); err != nil {
				t.Fatal(err)
			}
			_, res, err := publish.Recall(t.Context(), d, func(r *livepatch.Recalls) {
				r.Entries = append(r.Entries, livepatch.Recall{Kernel: b.BuildID, Sequence: 1, Reason: "it eats files"})
			}, now)
			if fault.CodeOf(err) != "custom_unreadable" || res.Changed {
				t.Errorf("%+v, %v", res, err)
			}
		})
	}
}

// TestAStrangerHearsOfRecalls: bundles that a revoked key signed stay in the
// list; whoever checks the published files refuses them, as machines do.
func TestAStrangerHearsOfRecalls(t *testing.T) {
	d := folder(t, trust.Lab)
	b := built(t, d, 1)
	if _, err := sign.Sign(d, b, now); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{b}, now); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(d.Anchor())
	if err != nil {
		t.Fatal(err)
	}
	ask := func() audit.Livepatch {
		anchor, err := trust.ParseAnchor(raw, true)
		if err != nil {
			t.Fatal(err)
		}
		a, err := audit.Repository(t.Context(), audit.Question{From: d.Repository(), Anchor: anchor, Now: now})
		if err != nil || len(a.Livepatches) != 1 {
			t.Fatal(a, err)
		}
		return a.Livepatches[0]
	}
	if l := ask(); !l.Accepted {
		t.Fatalf("before: %+v", l)
	}
	anchor, err := trust.ParseAnchor(raw, true)
	if err != nil {
		t.Fatal(err)
	}
	revoke := func(r *livepatch.Recalls) { r.Keys = append(r.Keys, livepatch.KeyDigest(anchor.ModuleKeys[0].Modulus)) }
	if _, _, err := publish.Recall(t.Context(), d, revoke, now); err != nil {
		t.Fatal(err)
	}
	if l := ask(); l.Accepted || l.Code != "module_key_unknown" {
		t.Errorf("after: %+v", l)
	}
}

// TestAKeyOfTwoGoesByItsName: while a new module key overlaps with the old one,
// the anchor has both, and the right one is revoked.
func TestAKeyOfTwoGoesByItsName(t *testing.T) {
	d := folder(t, trust.Lab)
	raw, err := os.ReadFile(d.Anchor())
	if err != nil {
		t.Fatal(err)
	}
	a, err := trust.ParseAnchor(raw, true)
	if err != nil {
		t.Fatal(err)
	}
	old := a.ModuleKeys[0]
	if got, err := sign.KeyDigest(d, "module"); err != nil || got != livepatch.KeyDigest(old.Modulus) {
		t.Errorf("the only one: %s, %v", got, err)
	}
	next := old
	next.Name, next.Modulus = "next", slices.Clone(old.Modulus)
	next.Modulus[len(next.Modulus)-1] ^= 2
	a.ModuleKeys = append(a.ModuleKeys, next)
	if raw, err = trustsign.Anchor(*a); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.Anchor(), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.KeyDigest(d, "module"); fault.CodeOf(err) != "no_such_key" {
		t.Errorf("one of two, without its name: %v", err)
	}
	for _, k := range a.ModuleKeys {
		if got, err := sign.KeyDigest(d, k.Name); err != nil || got != livepatch.KeyDigest(k.Modulus) {
			t.Errorf("%s: %s, %v", k.Name, got, err)
		}
	}
}
