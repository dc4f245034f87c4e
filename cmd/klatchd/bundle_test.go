// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/testkit"
	"klatch/internal/tufrepo"
)

// part is one member of a bundle, as it lies in the file.
func part(name string, content []byte) []byte {
	out := append([]byte{byte(len(name))}, name...)
	out = binary.BigEndian.AppendUint64(out, uint64(len(content)))
	return append(out, content...)
}

// spoiled rewrites a member's length.
func spoiled(bundle []byte, name string, size uint64) []byte {
	out := bytes.Clone(bundle)
	at := bytes.Index(out, append([]byte{byte(len(name))}, name...)) + 1 + len(name)
	binary.BigEndian.PutUint64(out[at:], size)
	return out
}

// TestAttackBundle is the part of group K that a klatchd process meets first:
// whoever holds the server and all metadata keys, and not those of the
// manifests, publishes a bundle in its proper place and offers it. The machine
// runs livepatch 1; it must refuse, stage nothing, and keep what it has.
func TestAttackBundle(t *testing.T) {
	testkit.Need(t, "root") // to ask for checks
	magic := []byte("KLATCHB1")
	with := func(change func(b livepatch.Bundle) []byte) func(*rig, []byte) []byte {
		return func(r *rig, good []byte) []byte {
			b, err := livepatch.ParseBundle(good)
			if err != nil {
				r.t.Fatal(err)
			}
			return change(b)
		}
	}
	raw := func(change func(good []byte) []byte) func(*rig, []byte) []byte {
		return func(_ *rig, good []byte) []byte { return change(bytes.Clone(good)) }
	}
	r := runsOne(t)
	m, good := r.fleet.Pub.Livepatch(r.machine.Kernel, 2)
	for _, tt := range []struct {
		name string
		code fault.Code
		evil func(r *rig, good []byte) []byte
	}{
		{"truncated members", "bundle_malformed", raw(func(b []byte) []byte { return b[:len(b)-1] })},
		{"half a bundle", "bundle_malformed", raw(func(b []byte) []byte { return b[:len(b)/2] })},
		{"the first member alone", "bundle_malformed", with(func(b livepatch.Bundle) []byte {
			return slices.Concat(magic, part("manifest", b.Manifest))
		})},
		{"padded members", "bundle_malformed", raw(func(b []byte) []byte { return append(b, 0) })},
		{"reordered members", "bundle_malformed", with(func(b livepatch.Bundle) []byte {
			return slices.Concat(magic, part("module", b.Module), part("manifest", b.Manifest))
		})},
		{"duplicate members: two manifests", "bundle_malformed", with(func(b livepatch.Bundle) []byte {
			return slices.Concat(magic, part("manifest", b.Manifest), part("manifest", b.Manifest), part("module", b.Module))
		})},
		{"duplicate members: two modules", "bundle_malformed", with(func(b livepatch.Bundle) []byte {
			return slices.Concat(magic, part("manifest", b.Manifest), part("module", b.Module), part("module", []byte("evil")))
		})},
		{"a member of another name", "bundle_malformed", with(func(b livepatch.Bundle) []byte {
			return slices.Concat(magic, part("manifest", b.Manifest), part("script", []byte("#!/bin/sh")), part("module", b.Module))
		})},
		{"a member that says it is huge", "bundle_malformed", raw(func(b []byte) []byte { return spoiled(b, "manifest", 1<<63) })},
		{"a member that says one byte more", "bundle_malformed", with(func(b livepatch.Bundle) []byte {
			return spoiled(b.Encode(), "module", uint64(len(b.Module)+1))
		})},
		{"bundle of another version", "bundle_malformed", raw(func(b []byte) []byte { b[7] = '2'; return b })},
		{"bundle of zero length", "bundle_malformed", func(*rig, []byte) []byte { return nil }},
		{"bundle over the limit", "metadata_malformed", func(*rig, []byte) []byte { return make([]byte, livepatch.MaxBundle+1) }},
		{"manifest of zero length", "manifest_untrusted", with(func(b livepatch.Bundle) []byte {
			return livepatch.Bundle{Module: b.Module}.Encode()
		})},
		{"module of zero length", "module_digest", with(func(b livepatch.Bundle) []byte {
			return livepatch.Bundle{Manifest: b.Manifest}.Encode()
		})},
		{"wrong digest in the manifest", "manifest_untrusted", with(func(b livepatch.Bundle) []byte {
			was, evil := sha256.Sum256(b.Module), bytes.Repeat([]byte("evil"), len(b.Module)/4+1)[:len(b.Module)]
			is := sha256.Sum256(evil)
			m := bytes.Replace(b.Manifest, []byte(hex.EncodeToString(was[:])), []byte(hex.EncodeToString(is[:])), 1)
			return livepatch.Bundle{Manifest: m, Module: evil}.Encode()
		})},
		{"another module than the manifest's", "module_digest", with(func(b livepatch.Bundle) []byte {
			return livepatch.Bundle{Manifest: b.Manifest, Module: bytes.Repeat([]byte("x"), len(b.Module))}.Encode()
		})},
		{"manifest by another publisher", "manifest_untrusted", func(r *rig, _ []byte) []byte {
			_, b := agenttest.NewPublisher(r.t).Livepatch(r.machine.Kernel, 2)
			return b
		}},
		{"the bundle of a neighbor build", "wrong_build", func(r *rig, _ []byte) []byte {
			k := r.machine.Kernel
			k.ID[0] ^= 1
			_, b := r.fleet.Pub.Livepatch(k, 2)
			return b
		}},
		{"the bundle of another sequence", "wrong_target", func(r *rig, _ []byte) []byte {
			_, b := r.fleet.Pub.Livepatch(r.machine.Kernel, 9)
			return b
		}},
	} {
		t.Run("Attack/K/"+tt.name, func(t *testing.T) {
			r.t = t
			r.offer(m.TargetPath(), tt.evil(r, good))
			r.refuses(tt.code)
		})
	}
	t.Run("Attack/K/bit flips", func(t *testing.T) {
		r.t = t
		for i := range 32 {
			evil := bytes.Clone(good)
			evil[i*(len(evil)-1)/31] ^= 1 << (i % 8)
			r.offer(m.TargetPath(), evil)
			if code := r.look(); code != "bundle_malformed" && code != "manifest_untrusted" && code != "module_digest" {
				t.Errorf("byte %d: code %q", i*(len(evil)-1)/31, code)
			}
		}
		if r.machine.Loads() != 1 {
			t.Errorf("%d loads", r.machine.Loads())
		}
	})
	r.t = t
	r.offer(m.TargetPath(), good) // the one that is right
	r.look()
	r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })
}

// runsOne is a machine whose klatchd has loaded livepatch 1 by itself.
func runsOne(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.machine.Write("etc/klatch/conf.d/60-test.toml", "check_interval = \"1h\"\n") // only when asked
	r.enroll()
	r.fleet.Publish(r.machine.Kernel, 1)
	r.start()
	r.look()
	r.until("confirmed", confirmed)
	return r
}

// offer publishes content under a name and offers it.
func (r *rig) offer(target string, content []byte) {
	r.fleet.Repo.Publish(time.Now(), tufrepo.Target{Path: target, Content: content, Replace: true})
	r.fleet.OfferTarget(target, 2)
}

// look has the daemon look now, and gives the code of what it found.
func (r *rig) look() fault.Code {
	r.t.Helper()
	before := r.until("up", func(agent.Status) bool { return true }).Check.At
	(&logged{rig: r}).check()
	return r.until("checked", func(s agent.Status) bool { return s.Check.At.After(before) }).Check.Code
}

// refuses: the offer is refused with this code and changes nothing.
func (r *rig) refuses(code fault.Code) {
	r.t.Helper()
	if got := r.look(); got != code {
		r.t.Errorf("code %q, want %q", got, code)
	}
	s := r.until("refused", func(s agent.Status) bool { return s.State.State == "check_failed" })
	if s.State.Reason != code || s.State.Sequence != 1 || r.machine.Loads() != 1 {
		r.t.Errorf("state %+v, %d loads; want code %s and livepatch 1", s.State, r.machine.Loads(), code)
	}
	if (&logged{rig: r}).staged() {
		r.t.Error("livepatch 2 was staged")
	}
}
