// SPDX-License-Identifier: Apache-2.0

//go:build system

package main_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/pki"
	"klatch/internal/rollout"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/tufclient"
	"klatch/internal/wire"
)

// fleetOf is a machine that asks the running server, as klatchd will: both
// repositories over the machines' port, and its own tier.
type fleetOf struct {
	*stage
	anchor *rollout.Anchor
	client *http.Client
	memory string
}

func (s *stage) rollout(anchorFile string) *fleetOf {
	s.t.Helper()
	b, err := os.ReadFile(anchorFile)
	if err != nil {
		s.t.Fatal(err)
	}
	a, err := rollout.ParseAnchor(b, true)
	if err != nil {
		s.t.Fatal(err)
	}
	out, _ := s.run(0, "klatch-server", "token", "create")
	c, err := pki.TLSForToken(wire.Token(strings.TrimSpace(out)), "127.0.0.1")
	if err != nil {
		s.t.Fatal(err)
	}
	return &fleetOf{s, a, &http.Client{Transport: &http.Transport{TLSClientConfig: c}}, s.t.TempDir()}
}

func (f *fleetOf) decide(tier string, k kernel.Build) (rollout.Choice, error) {
	f.t.Helper()
	now := time.Now()
	op, err := tufclient.Refresh(f.t.Context(), tufclient.Config{Root: f.anchor.Root, Dir: filepath.Join(f.memory, "o"+tier), BaseURL: f.fleet + "/rollout", Client: f.client,
		Now: now, Lazy: true, Operator: &tufclient.Operator{Approvers: f.anchor.Profile.Approvers()}})
	if err != nil {
		return rollout.Choice{}, err
	}
	pub, err := tufclient.Refresh(f.t.Context(), tufclient.Config{Root: f.publisher.Root, Dir: filepath.Join(f.memory, "p"+tier), BaseURL: f.fleet, Client: f.client, Now: now, Lazy: true})
	if err != nil {
		return rollout.Choice{}, err
	}
	return rollout.Decide(now, rollout.Machine{Tier: tier, Kernel: k}, rollout.View{
		Patches: func(path string) (rollout.Target, error) {
			t, err := pub.Target(path)
			return rollout.Target{Path: t.Path, Bytes: t.Bytes, SHA256: t.SHA256}, err
		},
		Rollout: func(path string, limit int64) (rollout.File, error) {
			t, err := op.Target(path)
			if err != nil {
				return rollout.File{}, err
			}
			b, err := op.Download(f.t.Context(), t, limit)
			return rollout.File{Role: t.Role, Content: b}, err
		},
	})
}

// await waits until a machine decides so: a sequence to take, or a code.
func (f *fleetOf) await(tier string, k kernel.Build, want string) {
	f.t.Helper()
	got := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		c, err := f.decide(tier, k)
		switch {
		case err != nil:
			got = string(fault.CodeOf(err))
		case c.Class == rollout.Take:
			got = fmt.Sprint(c.Sequence)
		default:
			got = string(c.Code)
		}
		if got == want {
			return
		}
	}
	f.t.Fatalf("a machine of %s decides %q, want %q\n%s", tier, got, want, f.log)
}

// TestRolloutJourney: an operator of profile small. The server selects in the
// first tier by itself; the second opens when two people have signed, whatever
// the admin token asks for; then the server is killed, restarted and held.
func TestRolloutJourney(t *testing.T) {
	s := newStage(t)
	k := pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	one := s.publisher.Release(time.Now(), k, 1, "CVE-2026-0001")
	s.init()
	_, stderr := s.run(2, "klatch-server", "rollout", "init", "--operator", "ops", "--profile", "small")
	if !strings.Contains(stderr, "--offline-keys") {
		t.Error(stderr)
	}
	stick, anchor := filepath.Join(t.TempDir(), "stick"), filepath.Join(t.TempDir(), "rollout.json")
	s.run(0, "klatch-server", "rollout", "init", "--operator", "ops", "--profile", "small", "--offline-keys", stick, "--anchor-file", anchor, "--tier", "canary", "--tier", "stable")
	s.run(0, "klatch-server", "sync", "--from", s.upstream)
	s.start()
	f := s.rollout(anchor)
	f.await("canary", k, "1")
	f.await("stable", k, "not_selected")
	if out, _ := s.run(0, "klatch-server", "rollout", "status"); !strings.Contains(out, "promotion  ") && !strings.Contains(out, "2 of 3 keys") {
		t.Error(out)
	}
	if out, _ := s.run(0, "klatch-fleet", "tier", "list"); !strings.Contains(out, "not promoted") || !strings.Contains(out, one) {
		t.Error(out)
	}

	draft := filepath.Join(t.TempDir(), "draft.json")
	out, _ := s.run(0, "klatch-fleet", "promote", "stable", "klatch_1.lpb", "--reason", "canaries are well", "--draft", draft)
	if !strings.Contains(out, "klatch-fleet draft sign") {
		t.Error(out)
	}
	s.run(3, "klatch-fleet", "promote", "stable", "--all", "--reason", "x", "--draft", draft) // the file is there
	_, stderr = s.run(3, "klatch-fleet", "draft", "complete", draft)
	if !strings.Contains(stderr, "0 of 2") || !strings.Contains(stderr, "hint: ") {
		t.Error(stderr)
	}
	copied := filepath.Join(t.TempDir(), "copy.json")
	b, err := os.ReadFile(draft)
	if err == nil {
		err = os.WriteFile(copied, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	sign := func(file, key string, want int) string {
		t.Helper()
		out, _ := s.run(want, "klatch-fleet", "draft", "sign", file, "--key", filepath.Join(stick, key), "--anchor", anchor, "--yes")
		return out
	}
	if out := sign(draft, "promotion-1.key", 0); !strings.Contains(out, "OPENS tier stable for "+one) || !strings.Contains(out, "canaries are well") {
		t.Error(out)
	}
	sign(draft, "promotion-1.key", 3) // once is enough
	sign(draft, "targets-1.key", 3)   // not asked for
	s.run(3, "klatch-fleet", "draft", "complete", draft)
	f.await("stable", k, "not_selected")
	sign(copied, "promotion-3.key", 0)
	s.run(0, "klatch-fleet", "draft", "complete", draft, copied)
	f.await("stable", k, "1")

	s.kill()
	s.publisher.Release(time.Now(), k, 2, "CVE-2026-0001", "CVE-2026-0002")
	s.run(0, "klatch-server", "sync", "--from", s.upstream)
	s.start()
	f.await("canary", k, "2")
	f.await("stable", k, "1")
	s.run(0, "klatch-fleet", "hold", "canary", "--reason", "the database team asks")
	f.await("canary", k, "held")
	s.run(3, "klatch-fleet", "release", "stable")
	s.run(0, "klatch-fleet", "release", "canary")
	f.await("canary", k, "2")

	// Other tiers are the targets keys' matter.
	if err := os.Remove(draft); err != nil {
		t.Fatal(err)
	}
	s.run(0, "klatch-fleet", "tier", "add", "early", "--place", "1", "--reason", "one more", "--draft", draft)
	sign(draft, "promotion-1.key", 3)
	sign(draft, "targets-1.key", 0)
	sign(draft, "targets-2.key", 0)
	s.run(0, "klatch-fleet", "draft", "complete", draft)
	f.await("early", k, "2")
	f.await("canary", k, "not_selected")

	var record struct {
		Broken  int
		Entries []struct{ What, Who, Reason string }
	}
	out, _ = s.run(0, "klatch-fleet", "audit", "--json")
	if err := json.Unmarshal([]byte(out), &record); err != nil {
		t.Fatal(err)
	}
	var did []string
	for _, e := range record.Entries {
		did = append(did, e.What)
	}
	if got := strings.Join(did, " "); got != "tiers release hold promote init" || record.Broken != 0 || record.Entries[3].Reason != "canaries are well" {
		t.Errorf("audit %q, %s", got, out)
	}
	out, _ = s.run(0, "klatch-fleet", "keys", "list")
	if !strings.Contains(out, "promotion") || !strings.Contains(out, "2 of 3") {
		t.Error(out)
	}

	// What was published is put back as it was before: the server refuses.
	s.kill()
	names, err := filepath.Glob(filepath.Join(s.data, "rollout", "metadata", "*.snapshot.json"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	timestamp := filepath.Join(s.data, "rollout", "metadata", "timestamp.json")
	if b, err = os.ReadFile(timestamp); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.run(0, "klatch-fleet", "hold", "stable", "--reason", "again")
	s.kill()
	if err := os.WriteFile(timestamp, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, stderr = s.run(3, "klatch-server", "serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
	if !strings.Contains(stderr, "was published from here") || !strings.Contains(stderr, "From a backup") {
		t.Error(stderr)
	}
}

// TestRolloutInALab: all keys lie on the server, and everything is in force at
// once: B46 and B47 by commands.
func TestRolloutInALab(t *testing.T) {
	s := newStage(t)
	k, other := pubsim.Kernel("6.1.0-50-cloud-amd64", 1), pubsim.Kernel("6.1.0-51-cloud-amd64", 2)
	s.publisher.Release(time.Now(), k, 1, "CVE-2026-0001")
	s.publisher.Release(time.Now(), other, 1, "CVE-2026-0001")
	s.init()
	s.run(0, "klatch-server", "sync", "--from", s.upstream)
	s.start()
	_, stderr := s.run(3, "klatch-fleet", "tier", "list")
	if !strings.Contains(stderr, "klatch-server rollout init") {
		t.Error(stderr)
	}
	s.kill()
	s.run(0, "klatch-server", "rollout", "init", "--operator", "ops", "--profile", "lab", "--tier", "canary", "--tier", "stable")
	s.run(3, "klatch-server", "rollout", "init", "--operator", "ops", "--profile", "lab")
	s.start()
	f := s.rollout(filepath.Join(s.data, "rollout.json"))
	f.await("canary", k, "1")
	f.await("canary", other, "1")

	s.run(3, "klatch-fleet", "token", "create", "--tier", "nobody")
	promote := func(want int, args ...string) {
		t.Helper()
		s.run(want, "klatch-fleet", append([]string{"promote", "--reason", "well", "--draft", filepath.Join(s.bin, "none")}, args...)...)
	}
	promote(0, "stable", "6.1.0-51-cloud-amd64/klatch_1.lpb")
	f.await("stable", other, "1")
	f.await("stable", k, "not_selected")
	promote(0, "stable", "--all")
	f.await("stable", k, "1")
	f.await("canary", k, "1")
	promote(3, "stable", "--all")
	promote(2, "canary", "--all")
	promote(2, "stable")

	s.run(0, "klatch-fleet", "tier", "add", "late", "--soak", "24")
	promote(0, "late", "--all")
	f.await("late", k, "not_selected") // soaks; the server does not even select it
	if out, _ := s.run(0, "klatch-fleet", "tier", "list"); !strings.Contains(out, "soaking") {
		t.Error(out)
	}
	s.run(0, "klatch-fleet", "tier", "soak", "late", "0")
	f.await("late", k, "1")
	s.run(0, "klatch-fleet", "tier", "move", "late", "--place", "1")
	s.publisher.Release(time.Now(), k, 2, "CVE-2026-0001", "CVE-2026-0002")
	s.run(0, "klatch-server", "sync", "--from", s.upstream)
	f.await("late", k, "2")
	f.await("canary", k, "not_selected") // it is second now, and nothing was promoted to it
	s.run(0, "klatch-fleet", "tier", "remove", "late")
	f.await("late", k, "tier_unknown")
	f.await("canary", k, "2")
	s.run(0, "klatch-fleet", "keys", "renew", "root", "promotion")
	f.await("stable", k, "1")
	var list struct {
		Tiers []struct{ Name string }
	}
	out, _ := s.run(0, "klatch-fleet", "tier", "list", "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.Tiers) != 2 || list.Tiers[0].Name != "canary" {
		t.Errorf("%s, %v", out, err)
	}
}
