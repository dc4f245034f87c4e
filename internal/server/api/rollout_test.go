// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/rolloutrepo"
	"klatch/internal/server/store"
)

// operator gives the world an operator's repository of profile lab, with one
// livepatch in the first tier.
func (w *world) operator() *adminapi.Client {
	w.t.Helper()
	data := filepath.Join(w.t.TempDir(), "data")
	if err := os.MkdirAll(data, 0o700); err != nil {
		w.t.Fatal(err)
	}
	tiers := rollout.Tiers{Format: rollout.TiersFormat, Tiers: []rollout.Tier{{Name: "canary"}, {Name: "stable"}}}
	if _, err := rolloutrepo.Init(w.t.Context(), data, rolloutrepo.Setup{Operator: "ops", Profile: rollout.Lab, Tiers: tiers}, time.Now()); err != nil {
		w.t.Fatal(err)
	}
	var err error
	if w.Rollout, err = rolloutrepo.Open(data, slog.New(slog.DiscardHandler)); err != nil {
		w.t.Fatal(err)
	}
	e := w.Repo.Catalog().Entries[0]
	if _, err := w.Rollout.Update(w.t.Context(), []rollout.Release{{Kernel: e.Kernel, Sequence: e.Sequence, Target: e.Target, Bytes: e.Bytes, SHA256: e.SHA256}}, time.Now()); err != nil {
		w.t.Fatal(err)
	}
	return &adminapi.Client{BaseURL: w.admin, Token: adminToken, HTTP: http.DefaultClient}
}

func TestServerWithoutAnOperatorSaysHowToMakeOne(t *testing.T) {
	w := newWorld(t)
	c := &adminapi.Client{BaseURL: w.admin, Token: adminToken, HTTP: http.DefaultClient}
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"rollout":  func() error { _, err := c.Rollout(ctx); return err },
		"tiers":    func() error { _, err := c.OrderTiers(ctx, adminapi.TierOrder{}); return err },
		"promote":  func() error { _, err := c.Promote(ctx, adminapi.Promotion{}); return err },
		"hold":     func() error { _, err := c.Hold(ctx, adminapi.Hold{}); return err },
		"keys":     func() error { _, err := c.OrderKeys(ctx, adminapi.KeyOrder{}); return err },
		"complete": func() error { _, err := c.Complete(ctx, adminapi.Completion{}); return err },
		"audit":    func() error { _, err := c.Audit(ctx, 5); return err },
	} {
		if err := call(); fault.CodeOf(err) != "no_rollout" || !strings.Contains(fault.HintOf(err), "klatch-server rollout init") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if status, _, _ := w.do(w.machine(""), "GET", w.fleet+"/rollout/metadata/timestamp.json", nil, nil); status != 404 {
		t.Errorf("status %d", status)
	}
}

func TestServerThatFollowsTiersTakesNoOrders(t *testing.T) {
	w := newWorld(t)
	c := w.operator()
	anchor, err := w.Rollout.Anchor().Encode()
	if err != nil {
		t.Fatal(err)
	}
	data := t.TempDir()
	if _, err := rolloutrepo.Adopt(t.Context(), data, anchor); err != nil {
		t.Fatal(err)
	}
	if w.Rollout, err = rolloutrepo.Follow(data, "https://above.example.org", slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"tiers": func() error {
			_, err := c.OrderTiers(ctx, adminapi.TierOrder{Op: adminapi.TierRemove, Name: "stable"})
			return err
		},
		"promote":  func() error { _, err := c.Promote(ctx, adminapi.Promotion{}); return err },
		"hold":     func() error { _, err := c.Hold(ctx, adminapi.Hold{}); return err },
		"keys":     func() error { _, err := c.OrderKeys(ctx, adminapi.KeyOrder{}); return err },
		"complete": func() error { _, err := c.Complete(ctx, adminapi.Completion{}); return err },
	} {
		if err := call(); fault.CodeOf(err) != "rollout_upstream" || !strings.Contains(fault.HintOf(err), "https://above.example.org") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Rollout(ctx); fault.CodeOf(err) != "rollout_not_copied" || fault.HintOf(err) == "" {
		t.Error(err)
	}
	if _, err := c.CreateToken(ctx, adminapi.TokenOrder{Tier: "stable"}); fault.CodeOf(err) != "rollout_not_copied" {
		t.Error(err)
	}
	if status, _, _ := w.do(w.machine(""), "GET", w.fleet+"/rollout/metadata/timestamp.json", nil, nil); status != 404 {
		t.Errorf("status %d", status)
	}
}

func TestOrdersOfPeopleAreChecked(t *testing.T) {
	w := newWorld(t)
	c := w.operator()
	if err := w.Store.Seen(t.Context(), store.Sighting{MachineID: "mch_1", Tier: "stable", Seen: time.Now()}); err != nil {
		t.Fatal(err)
	}
	tier := func(o adminapi.TierOrder) func(context.Context) error {
		return func(ctx context.Context) error { _, err := c.OrderTiers(ctx, o); return err }
	}
	keys := func(o adminapi.KeyOrder) func(context.Context) error {
		return func(ctx context.Context) error { _, err := c.OrderKeys(ctx, o); return err }
	}
	for _, tt := range []struct {
		name string
		call func(context.Context) error
		code fault.Code
	}{
		{"an op that is none", tier(adminapi.TierOrder{Op: "swap", Name: "stable"}), "bad_body"},
		{"a tier with machines", tier(adminapi.TierOrder{Op: adminapi.TierRemove, Name: "stable"}), "tier_in_use"},
		{"a key that is none", keys(adminapi.KeyOrder{Role: "promotion", Add: []string{"x"}}), "bad_key"},
		{"a key that is broken", keys(adminapi.KeyOrder{Role: "promotion", Add: []string{"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"}}), "bad_key"},
		{"keys of nobody", keys(adminapi.KeyOrder{Add: []string{"x"}}), "no_role"},
		{"a role that is none", keys(adminapi.KeyOrder{Renew: []string{"select"}}), "no_role"},
		{"the only key out", keys(adminapi.KeyOrder{Role: "promotion", Remove: []string{strings.Repeat("ab", 32)}}), "no_such_key"},
		{"a draft that is none", func(ctx context.Context) error {
			_, err := c.Complete(ctx, adminapi.Completion{Draft: []byte(`{"format":"x"}`)})
			return err
		}, "bad_draft"},
		{"a token for nobody", func(ctx context.Context) error {
			_, err := c.CreateToken(ctx, adminapi.TokenOrder{Tier: "nobody"})
			return err
		}, "no_tier"},
	} {
		if err := tt.call(t.Context()); fault.CodeOf(err) != tt.code {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.code)
		}
	}
	r, err := c.Rollout(t.Context())
	if err != nil || len(r.Tiers) != 2 || r.Tiers[1].Machines != 1 || len(r.Tiers[0].Selected) != 1 || len(r.Tiers[1].Waiting) != 1 || len(r.Roles) != 6 {
		t.Errorf("%+v, %v", r, err)
	}
	a, err := c.OrderTiers(t.Context(), adminapi.TierOrder{Op: adminapi.TierRemove, Name: "stable", Force: true, By: "an\x1bna"})
	if err != nil || !a.InForce {
		t.Errorf("%+v, %v", a, err)
	}
	record, err := c.Audit(t.Context(), 1)
	if err != nil || len(record.Entries) != 1 || record.Entries[0].Who != "admin token, says to be an?na" {
		t.Errorf("%+v, %v", record, err)
	}
	for path, want := range map[string]int{"metadata/timestamp.json": 200, "metadata/1.root.json": 200, "metadata/": 404, "../rollout-keys/select-1.key": 404, "..%2Frollout-keys%2Fselect-1.key": 404, "targets/select-1.key": 404, ".lock": 404} {
		if status, _, _ := w.do(w.machine(""), "GET", w.fleet+"/rollout/"+path, nil, nil); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
		}
	}
}
