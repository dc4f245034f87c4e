// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bytes"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

// attack is one livepatch that must be refused, on two ways: handed to the
// loader by a hostile daemon, and offered by a hostile server with metadata
// that is signed as it should be.
type attack struct {
	name   string
	n      livepatch.Sequence
	make   func(n livepatch.Sequence) livepatch.Bundle
	loader fault.Code
	// daemon is the reason in klatch status. Where the daemon has no key to
	// see it, the loader's refusal ends the journey in phase failed.
	daemon fault.Code
	failed bool
}

func attacks(p, stranger *publisher, neighbor kernel.Build) []attack {
	here := p.build()
	rebuilt, renamed := here, here
	rebuilt.ID = neighbor.ID
	renamed.Release = neighbor.Release
	with := func(k kernel.Build, module func(n livepatch.Sequence) []byte) func(livepatch.Sequence) livepatch.Bundle {
		return func(n livepatch.Sequence) livepatch.Bundle {
			b := module(n)
			return livepatch.Bundle{Manifest: p.manifest(k, n, b), Module: b}
		}
	}
	spoiled := func(spoil func([]byte) []byte) func(livepatch.Sequence) livepatch.Bundle {
		return func(n livepatch.Sequence) livepatch.Bundle {
			b := p.livepatch(n)
			b.Module = spoil(b.Module)
			return b
		}
	}
	return []attack{
		{"unsigned module", 3, with(here, func(n livepatch.Sequence) []byte {
			raw, _ := p.made.module(p.t, n)
			return raw
		}), "module_unsigned", "module_unsigned", true},
		{"foreign module key", 4, with(here, stranger.signedModule), "module_key_unknown", "module_key_unknown", true},
		{"flipped bit", 5, spoiled(func(b []byte) []byte {
			b = bytes.Clone(b)
			b[len(b)/2] ^= 1
			return b
		}), "module_digest", "module_digest", false},
		{"flipped bit that the manifest agrees with", 6, with(here, func(n livepatch.Sequence) []byte {
			b := p.signedModule(n)
			b[len(b)/2] ^= 1
			return b
		}), "module_signature_bad", "module_signature_bad", true},
		{"truncated module", 5, spoiled(func(b []byte) []byte { return b[:len(b)-1] }), "module_truncated", "module_digest", false},
		{"manifest by another key", 5, stranger.livepatch, "manifest_untrusted", "manifest_untrusted", false},
		{"neighbor kernel build", 5, with(neighbor, p.signedModule), "wrong_build", "wrong_build", false},
		{"same release, other build", 5, with(rebuilt, p.signedModule), "wrong_build", "wrong_build", false},
		{"same build, other release", 5, with(renamed, p.signedModule), "wrong_release", "wrong_release", false},
		{"lower sequence", 1, p.livepatch, "sequence_lower", "sequence_lower", false},
		{"same sequence", 2, p.livepatch, "sequence_same", "sequence_same", false},
	}
}

// TestVMRefused: each of these has its own reason code and changes nothing:
// not the kernel, not the loader's journal, not its store. A good livepatch
// still goes in afterwards.
func TestVMRefused(t *testing.T) {
	m := everything(t)
	fleet := agenttest.NewFleet(t, "e2e")
	p := newPublisher(t, "e2e", m)
	p.Repo, p.Anchor.Root = fleet.Repo, fleet.Repo.Root // the hostile server's own repository, with the publisher's keys
	stranger := newPublisher(t, "stranger", m)
	g := bootMachine(t, m, p)
	g.install("check_interval = \"0\"\nsoak = \"1s\"\n")
	g.enroll(portOf(fleet.URL), fleet.Token)

	for _, n := range []livepatch.Sequence{1, 2} {
		p.release(n, p.livepatch(n))
		fleet.OfferTarget(p.target(n), n)
		g.try("klatch", "check")
		g.confirmed(n)
	}
	neighbor := p.build()
	neighbor.Release, neighbor.ID = "6.1.0-49-cloud-amd64", kernel.BuildID{0xab, 2}

	for _, a := range attacks(p, stranger, neighbor) {
		t.Run("Attack/K/loader: "+a.name, func(t *testing.T) {
			g.t = t
			before := g.footprint()
			if got := g.give(a.make(a.n)); got.Code != a.loader {
				t.Errorf("code %q (%s), want %q", got.Code, got.Text, a.loader)
			}
			if after := g.footprint(); after != before {
				t.Errorf("something changed:\n%s\n---\n%s", before, after)
			}
		})
	}
	for _, a := range attacks(p, stranger, neighbor) {
		t.Run("Attack/K/server: "+a.name, func(t *testing.T) {
			g.t = t
			b := a.make(a.n)
			target := p.target(a.n)
			if a.n > 2 {
				p.withdraw(target) // of an attack before
				p.release(a.n, b)
			}
			fleet.Set(func(s *agenttest.Server) {
				s.Offer, s.Insist = &wire.Offer{Target: target, Sequence: a.n}, true
			})
			before := g.footprint()
			g.try("klatch", "check")
			s := g.until("refused", func(s agent.Status) bool {
				return s.State.Phase == wire.Idle && (s.State.State == "failed" || s.State.State == "check_failed")
			})
			word := map[bool]string{true: "failed", false: "check_failed"}[a.failed]
			if s.State.State != word || s.State.Reason != a.daemon {
				t.Errorf("state %s, reason %s; want %s, %s: %s", s.State.State, s.State.Reason, word, a.daemon, s.State.Text)
			}
			if after := g.footprint(); after != before {
				t.Errorf("something changed:\n%s\n---\n%s", before, after)
			}
			if a.failed { // forget it, so that the next one speaks for itself
				fleet.Set(func(s *agenttest.Server) { s.Offer = nil })
				g.run("klatch", "retry")
			}
		})
	}
	for _, a := range []struct {
		name string
		lie  func()
		code fault.Code
	}{
		{"expired metadata", func() {
			serveLie(p, "/metadata/timestamp.json", p.stale())
		}, "metadata_expired"},
		{"metadata rolled back", func() {
			old := p.Read("metadata/timestamp.json")
			p.Publish(time.Now(), tufrepo.Target{Path: "debian-12/news", Content: []byte("news")})
			fleet.Set(func(s *agenttest.Server) { s.Offer = nil })
			g.run("klatch", "check") // the machine has seen the news
			serveLie(p, "/metadata/timestamp.json", old)
		}, "metadata_rollback"},
	} {
		t.Run("Attack/M/server: "+a.name, func(t *testing.T) {
			g.t = t
			defer p.Forget()
			a.lie()
			before := g.footprint()
			g.try("klatch", "check")
			if s := g.status(); s.State.State != "check_failed" || s.State.Reason != a.code {
				t.Errorf("state %s, reason %s; want check_failed, %s", s.State.State, s.State.Reason, a.code)
			}
			if after := g.footprint(); after != before {
				t.Errorf("something changed:\n%s\n---\n%s", before, after)
			}
		})
	}
	t.Run("a good one still goes in", func(t *testing.T) {
		g.t = t
		p.release(9, p.livepatch(9))
		fleet.Set(func(s *agenttest.Server) { s.Insist = false })
		fleet.OfferTarget(p.target(9), 9)
		g.run("klatch", "check")
		g.confirmed(9)
		g.checks(false, false)
		var refused []fault.Code
		for _, r := range fleet.Reports() {
			if (r.Event == wire.EventRefused || r.Event == wire.EventFailed) && !slices.Contains(refused, r.Code) {
				refused = append(refused, r.Code)
			}
		}
		for _, c := range []fault.Code{"module_unsigned", "module_key_unknown", "manifest_untrusted", "wrong_build", "sequence_lower", "metadata_expired", "metadata_rollback"} {
			if !slices.Contains(refused, c) {
				t.Errorf("the server was not told of %s: %v", c, refused)
			}
		}
	})
	g.t = t
}

func portOf(url string) string { return url[strings.LastIndexByte(url, ':')+1:] }

func serveLie(p *publisher, path string, content []byte) {
	p.Lie(path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) })
}
