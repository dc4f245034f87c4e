// SPDX-License-Identifier: Apache-2.0

//go:build system

package main_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/testkit/pubsim"
	"klatch/internal/wire"
)

// TestAMirrorFollowsUpstreamsTiers: three servers, and the tiers of the first.
// What people promote and hold there, machines of the last one obey, with the
// operator's anchor and without it; the servers below change nothing. Then the
// one above shows an older state, and another operator's: neither is taken.
func TestAMirrorFollowsUpstreamsTiers(t *testing.T) {
	top := newStage(t)
	k := pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	one := top.publisher.Release(time.Now(), k, 1, "CVE-2026-0001")
	top.init()
	operator := func() {
		t.Helper()
		top.run(0, "klatch-server", "rollout", "init", "--operator", "ops", "--profile", "lab", "--tier", "canary", "--tier", "stable")
	}
	operator()
	top.run(0, "klatch-server", "sync", "--from", top.upstream)
	top.run(0, "klatch-server", "configure", "--upstream", top.upstream, "--interval", "1s", "--closed")
	anchor := filepath.Join(top.data, "rollout.json")
	if _, stderr := top.run(3, "klatch-server", "configure", "--rollout", "upstream", "--rollout-anchor", anchor); !strings.Contains(stderr, "repository of its own") {
		t.Error(stderr)
	}
	top.start()
	middle, low := top.below(), top.below()
	for _, pair := range [][2]*stage{{middle, top}, {low, middle}} {
		s := pair[0]
		s.init()
		s.join(pair[1])
		if _, stderr := s.run(3, "klatch-server", "configure", "--rollout", "upstream"); !strings.Contains(stderr, "--rollout-anchor FILE") {
			t.Error(stderr)
		}
		s.run(2, "klatch-server", "configure", "--rollout", "elsewhere")
		s.run(0, "klatch-server", "configure", "--interval", "1s", "--rollout", "upstream", "--rollout-anchor", anchor)
		s.start()
	}
	f := low.rollout(anchor)
	f.await("canary", k, "1")
	f.await("stable", k, "not_selected")
	enroll := func(tier string) func() bool {
		t.Helper()
		out, _ := low.run(0, "klatch-fleet", "token", "create", "--tier", tier)
		facts := wire.Facts{Hostname: tier, Kernel: k, Version: "test"}
		machine, _, problem := low.enroll(wire.Token(strings.TrimSpace(out)), facts)
		if machine == nil {
			t.Fatal(problem)
		}
		return func() bool {
			t.Helper()
			var answer wire.CheckAnswer
			if status, p := low.call(machine, "/v1/check", wire.CheckRequest{Facts: facts}, &answer); status != 200 {
				t.Fatal(p)
			}
			return answer.Offer != nil
		}
	}
	offers := func(who string, offered func() bool, want bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if offered() == want {
				return
			}
		}
		t.Errorf("a machine of %s without the anchor: offered %t, want %t\n%s", who, !want, want, low.log)
	}
	low.run(3, "klatch-fleet", "token", "create", "--tier", "nobody")
	canary, stable := enroll("canary"), enroll("stable")
	offers("canary", canary, true)
	if stable() {
		t.Error("a machine of a tier that nobody opened is offered a livepatch")
	}
	old := filepath.Join(t.TempDir(), "old")
	for from, to := range map[string]string{top.publisher.Dir: old, filepath.Join(top.data, "rollout"): filepath.Join(old, "rollout")} {
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
	}

	// Below nobody changes anything, and each refusal names the server above.
	draft := filepath.Join(t.TempDir(), "draft.json")
	for _, args := range [][]string{
		{"klatch-fleet", "promote", "stable", "--all", "--reason", "x", "--draft", draft},
		{"klatch-fleet", "hold", "canary", "--reason", "x"},
		{"klatch-fleet", "release", "canary"},
		{"klatch-fleet", "tier", "add", "early", "--reason", "x", "--draft", draft},
		{"klatch-fleet", "tier", "remove", "stable", "--reason", "x", "--draft", draft},
		{"klatch-fleet", "keys", "renew", "root", "--reason", "x", "--draft", draft},
		{"klatch-server", "rollout", "init", "--operator", "ops", "--profile", "lab"},
	} {
		if _, stderr := low.run(3, args[0], args[1:]...); !strings.Contains(stderr, "follows the tiers of") || !strings.Contains(stderr, "at "+middle.fleet) {
			t.Errorf("%v: %s", args, stderr)
		}
	}

	top.run(0, "klatch-fleet", "promote", "stable", "--all", "--reason", "canaries are well")
	f.await("stable", k, "1")
	offers("stable", stable, true)
	top.run(0, "klatch-fleet", "hold", "canary", "--reason", "the database team asks")
	f.await("canary", k, "held")
	offers("canary", canary, false)
	if out, _ := low.run(0, "klatch-fleet", "tier", "list"); !strings.Contains(out, "followed from "+middle.fleet) || !strings.Contains(out, "the database team asks") || !strings.Contains(out, one) {
		t.Error(out)
	}
	low.await("good for the tiers", func(s status) bool {
		return s.Tiers.From == "upstream" && s.Tiers.Upstream == middle.fleet && s.Tiers.Operator == "ops" && s.Tiers.Version > 0 &&
			s.Tiers.Expires.After(time.Now()) && s.Tiers.Problem == "" && s.Last.Code == ""
	})
	if out, _ := low.run(0, "klatch-server", "status"); !strings.Contains(out, "operator ops, followed from "+middle.fleet) {
		t.Error(out)
	}

	// A server without a network takes them from a file; one that follows
	// nobody takes the livepatches only.
	dir := t.TempDir()
	with, without := filepath.Join(dir, "with"), filepath.Join(dir, "without")
	low.run(0, "klatch-server", "export", with)
	plain, gap := top.below(), top.below()
	plain.init()
	plain.run(0, "klatch-server", "import", with)
	if s := plain.status(); s.Tiers.From != "none" || s.Livepatches != 1 {
		t.Errorf("%+v", s)
	}
	plain.run(0, "klatch-server", "export", without)
	gap.init()
	gap.run(0, "klatch-server", "configure", "--rollout", "upstream", "--rollout-anchor", anchor)
	if _, stderr := gap.run(3, "klatch-server", "import", without); !strings.Contains(stderr, "the file has none") {
		t.Error(stderr)
	}
	if s := gap.status(); s.Tiers.Problem == "" || s.Livepatches != 1 || s.Last.Code != "import_no_tiers" {
		t.Errorf("%+v", s)
	}
	gap.run(0, "klatch-server", "import", with)
	gap.start()
	across := gap.rollout(anchor)
	across.await("canary", k, "held")
	across.await("stable", k, "1")

	// An older state, where the livepatches are as good as before.
	middle.kill()
	had := middle.status().Tiers.Version
	if _, stderr := middle.run(3, "klatch-server", "sync", "--from", old); !strings.Contains(stderr, "the old ones stay") || !strings.Contains(stderr, "hint: ") {
		t.Error(stderr)
	}
	if s := middle.status(); s.Last.Code != "metadata_rollback" || s.Tiers.Version != had || s.Livepatches != 1 {
		t.Errorf("%+v", s)
	}
	middle.start()

	// Another operator at the same address; new livepatches arrive all the same.
	top.kill()
	for _, name := range []string{"rollout", "rollout-keys", "rollout.json", "rollout-state.json", "audit.log"} {
		if err := os.Rename(filepath.Join(top.data, name), filepath.Join(t.TempDir(), name)); err != nil {
			t.Fatal(err)
		}
	}
	operator()
	top.start()
	top.publisher.Release(time.Now(), k, 2, "CVE-2026-0001", "CVE-2026-0002")
	low.await("given the new livepatch", func(s status) bool { return s.Livepatches == 2 })
	middle.await("told that the tiers are not the operator's", func(s status) bool { return s.Last.Code == "metadata_untrusted" && s.Tiers.Problem == "" })
	f.await("canary", k, "held")
	f.await("stable", k, "1")
	if canary() || !stable() {
		t.Errorf("without the anchor: canary %t, stable %t", canary(), stable())
	}
}
