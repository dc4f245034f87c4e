// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/rollout"
	"klatch/internal/stall"
	"klatch/internal/testkit/signed"
	"klatch/internal/trustsign"
	"klatch/internal/wire"
)

type oneTarget []byte

func (oneTarget) Static(context.Context, string, int64) ([]byte, error) {
	return nil, fault.New(fault.NotFound, "file_missing", "nothing here")
}

func (oneTarget) Recalls() string { return "" }

func (oneTarget) EvidencePolicy() string { return "" }

func (oneTarget) Beside(string) []string { return nil }

func (oneTarget) Metadata() (v wire.Versions, signed time.Time) { return v, signed }

func (o oneTarget) Named(target string) (Listed, error) {
	return Listed{Target: rollout.Target{Path: target, Bytes: int64(len(o)), SHA256: digestOf(o)}}, nil
}

func (o oneTarget) Fetch(context.Context, string, int64) ([]byte, error) { return o, nil }

// TestEachPartOfABundleIsLookedAt: signed by the publisher, and still wrong.
func TestEachPartOfABundleIsLookedAt(t *testing.T) {
	p, err := signed.NewPublisher("ours")
	if err != nil {
		t.Fatal(err)
	}
	anchor := p.Anchor()
	running := kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}
	module := []byte("module")
	for _, c := range []struct {
		name  string
		spoil func(*livepatch.Manifest)
		offer func(*wire.Offer)
		code  fault.Code
	}{
		{name: "good"},
		{name: "another SHA-256", spoil: func(m *livepatch.Manifest) { m.Module.SHA256 = strings.Repeat("0", 64) }, code: "module_digest"},
		{name: "another SHA-512", spoil: func(m *livepatch.Manifest) { m.Module.SHA512 = strings.Repeat("0", 128) }, code: "module_digest"},
		{name: "another length", spoil: func(m *livepatch.Manifest) { m.Module.Bytes++ }, code: "module_digest"},
		{name: "another sequence offered", offer: func(o *wire.Offer) { o.Sequence++ }, code: "wrong_target"},
		{name: "another path offered", offer: func(o *wire.Offer) { o.Target = "x" + o.Target }, code: "wrong_target"},
		{name: "another build", spoil: func(m *livepatch.Manifest) { m.Kernel.ID[3] = 9 }, code: "wrong_build"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := signed.Manifest(running, 3, module)
			if c.spoil != nil {
				c.spoil(&m)
			}
			text, err := trustsign.Manifest(m, p.Signers...)
			if err != nil {
				t.Fatal(err)
			}
			offer := wire.Offer{Target: m.TargetPath(), Sequence: m.Sequence}
			if c.offer != nil {
				c.offer(&offer)
			}
			bundle := livepatch.Bundle{Manifest: text, Module: module}.Encode()
			tr := &trial{snapshot: oneTarget(bundle), anchor: &anchor, offer: offer, o: observation{Facts: wire.Facts{Kernel: running}}}
			err = errors.Join(tr.download(t.Context()), tr.openBundle(t.Context()), tr.checkKernel(t.Context()), tr.checkModule(t.Context()))
			if fault.CodeOf(err) != c.code || (err == nil) != (c.code == "") {
				t.Errorf("got %v, want code %q", err, c.code)
			}
		})
	}
}

// Who blocks a transition chooses the names of 20 tasks, and so what this
// machine says. It must stay a text that the server takes: otherwise a local
// user keeps the machine from every check.
func TestForeignWordsStayBelowTheServersLimit(t *testing.T) {
	var tasks []stall.Task
	for range 64 {
		tasks = append(tasks, stall.ParseTask(4194303, 4194303, "4194303 (\xff\x01\xff\x01\xff\x01\xff\x01\xff\x01\xff\x01\xff\x01\xff) S 1 1 1 1 1 1",
			[]string{strings.Repeat("long_name_", 12) + "+0x1/0x2"}))
	}
	o := explain(stall.All(tasks, nil))
	text := o.text
	if len(o.blocking) != maxBlocking || o.counts[0].Tasks != 64 {
		t.Errorf("%d named, counts %+v", len(o.blocking), o.counts)
	}
	s := describe(inputs{o: observation{}, j: journal{Phase: wire.Stalled, Work: &work{Sequence: 3, Text: text}}, enrolled: true})
	if s.State != "stalled" || len(s.Text) > wire.MaxText || len(s.NextStep) > wire.MaxText {
		t.Errorf("state %s with a text of %d bytes, limit %d", s.State, len(s.Text), wire.MaxText)
	}
	for _, in := range []string{text, strings.Repeat("\xff", 9000), strings.Repeat("…", 9000), ""} {
		out := clip(in)
		again, err := json.Marshal(out)
		if err != nil {
			t.Fatal(err)
		}
		var back string
		if err := json.Unmarshal(again, &back); err != nil || len(back) > wire.MaxText || back != out {
			t.Errorf("%.20q: %d bytes arrive, limit %d, %v", in, len(back), wire.MaxText, err)
		}
	}
}
