// SPDX-License-Identifier: Apache-2.0

package rollout_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	. "klatch/internal/rollout"
)

func TestTiersAreRefused(t *testing.T) {
	many := make([]Tier, MaxTiers+1)
	for i := range many {
		many[i].Name = fmt.Sprintf("t%d", i)
	}
	for name, tiers := range map[string]Tiers{
		"of another format":            {"klatch-tiers/2", []Tier{{"canary", 0}}},
		"without one":                  {TiersFormat, nil},
		"with too many":                {TiersFormat, many},
		"with one twice":               {TiersFormat, []Tier{{"canary", 0}, {"canary", 1}}},
		"with a path for a name":       {TiersFormat, []Tier{{"../x", 0}}},
		"with a soak before the first": {TiersFormat, []Tier{{"canary", 1}}},
		"with a soak below zero":       {TiersFormat, []Tier{{"canary", 0}, {"stable", -1}}},
		"with a soak of years":         {TiersFormat, []Tier{{"canary", 0}, {"stable", MaxSoak + 1}}},
	} {
		if _, err := tiers.Encode(); fault.CodeOf(err) != "tiers_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSelectionsAndPromotionsAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Selection){
		"another format":     func(s *Selection) { s.Format = "klatch-select/2" },
		"no tier":            func(s *Selection) { s.Tier = "" },
		"no distribution":    func(s *Selection) { s.Kernel.Distro, s.Target = "", strings.TrimPrefix(s.Target, "debian-12") },
		"no architecture":    func(s *Selection) { s.Kernel.Arch, s.Target = "", strings.Replace(s.Target, "amd64", "", 1) },
		"no release":         func(s *Selection) { s.Kernel.Release, s.Target = "", "debian-12/amd64//klatch_3.lpb" },
		"no build id":        func(s *Selection) { s.Kernel.ID = kernel.BuildID{} },
		"sequence 0":         func(s *Selection) { s.Sequence, s.Target = 0, target(stock, 0) },
		"target of another":  func(s *Selection) { s.Target = target(stock, 4) },
		"a policy as target": func(s *Selection) { s.Target = "policy/recalls-1.note" },
		"no bytes":           func(s *Selection) { s.Bytes = 0 },
		"endless bytes":      func(s *Selection) { s.Bytes = 1 << 40 },
		"upper-case digest":  func(s *Selection) { s.SHA256 = strings.ToUpper(good) },
		"hold, no reason":    func(s *Selection) { s.Hold = true },
		"reason, no hold":    func(s *Selection) { s.Reason = "because" },
		"reason with escape": func(s *Selection) { s.Hold, s.Reason = true, "\x1b[2J" },
		"reason without end": func(s *Selection) { s.Hold, s.Reason = true, strings.Repeat("x", 501) },
	} {
		s := selection("canary")
		change(&s)
		if _, err := s.Encode(); fault.CodeOf(err) != "selection_malformed" {
			t.Errorf("selection with %s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*Promotion){
		"another format":   func(p *Promotion) { p.Format = "" },
		"tier as a path":   func(p *Promotion) { p.Tier = "a/b" },
		"no digest":        func(p *Promotion) { p.SHA256 = "" },
		"no target":        func(p *Promotion) { p.Target = "" },
		"lines in target":  func(p *Promotion) { p.Target += "\nOPENS tier canary for a/b" },
		"bidi in target":   func(p *Promotion) { p.Target += "\u202e" },
		"target upwards":   func(p *Promotion) { p.Target = "../" + p.Target },
		"endless target":   func(p *Promotion) { p.Target = strings.Repeat("x", 513) },
		"no time":          func(p *Promotion) { p.PromotedAt = time.Time{} },
		"no begin":         func(p *Promotion) { p.Since = time.Time{} },
		"soak from after":  func(p *Promotion) { p.Since = p.PromotedAt.Add(1) },
		"no reason":        func(p *Promotion) { p.Reason = "" },
		"broken UTF-8":     func(p *Promotion) { p.Reason = "a\xff" },
		"reason with bell": func(p *Promotion) { p.Reason = "\a" },
	} {
		p := promotion("stable")
		change(&p)
		if _, err := p.Encode(); fault.CodeOf(err) != "promotion_malformed" {
			t.Errorf("promotion with %s: %v", name, err)
		}
	}
}

func TestOnlyTheOneFormIsRead(t *testing.T) {
	s, err := selection("canary").Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"a space at the end": append(bytes.Clone(s), ' '), "two": append(bytes.Clone(s), s...), "nothing": nil,
		"a member twice":       bytes.Replace(s, []byte(`"hold": false`), []byte(`"hold": true, "hold": false`), 1),
		"a member more":        bytes.Replace(s, []byte(`"hold": false`), []byte(`"hold": false, "urgent": true`), 1),
		"a name in upper case": bytes.Replace(s, []byte(`"hold"`), []byte(`"HOLD"`), 1),
		"an offset":            bytes.Replace(s, []byte(`Z"`), []byte(`+00:00"`), 1),
		"a float":              bytes.Replace(s, []byte(`"bytes": 1000`), []byte(`"bytes": 1e3`), 1),
		"another key":          append(append([]byte{}, s[:len(s)-2]...), []byte(" \n}\n")...),
		"endless":              append(bytes.Clone(s), bytes.Repeat([]byte{' '}, MaxSelectionFile)...),
	} {
		if _, err := ParseSelection(b); fault.CodeOf(err) != "selection_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseSelection(s); err != nil {
		t.Error(err)
	}
}

func TestAnchor(t *testing.T) {
	a := Anchor{Format: AnchorFormat, Operator: "ops.example.org", Profile: Small, Root: []byte(`{"signed":{}}`)}
	b, err := a.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseAnchor(b, false)
	if err != nil || got.Operator != a.Operator || !bytes.Equal(got.Root, a.Root) || got.Profile.Approvers() != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	for name, change := range map[string]func(*Anchor){
		"another format":   func(a *Anchor) { a.Format = "klatch-trust/1" },
		"no operator":      func(a *Anchor) { a.Operator = "" },
		"unknown profile":  func(a *Anchor) { a.Profile = "none" },
		"no root":          func(a *Anchor) { a.Root = nil },
		"a root of scraps": func(a *Anchor) { a.Root = []byte("{") },
	} {
		x := a
		change(&x)
		if _, err := x.Encode(); fault.CodeOf(err) != "rollout_anchor_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	a.Profile = Lab
	if b, err = a.Encode(); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseAnchor(b, false); fault.CodeOf(err) != "lab_keys" || fault.HintOf(err) == "" {
		t.Errorf("lab keys: %v", err)
	}
	if got, err := ParseAnchor(b, true); err != nil || got.Profile.Approvers() != 1 {
		t.Errorf("lab keys that are allowed: %v", err)
	}
	a.Root = []byte(`"` + strings.Repeat("x", MaxAnchor) + `"`)
	if b, err = a.Encode(); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseAnchor(b, true); fault.CodeOf(err) != "rollout_anchor_malformed" || !strings.Contains(err.Error(), "limit") {
		t.Errorf("too long: %v", err)
	}
}

// FuzzParseRollout: what any of the readers accepts is the one form of what it
// read, and never a surprise in a path.
func FuzzParseRollout(f *testing.F) {
	for _, v := range []interface{ Encode() ([]byte, error) }{
		selection("canary"), promotion("stable"), Tiers{TiersFormat, []Tier{{"canary", 0}, {"stable", 24}}},
		Anchor{Format: AnchorFormat, Operator: "ops", Profile: Full, Root: []byte(`{}`)},
	} {
		b, err := v.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(bytes.Replace(b, []byte(`"format"`), []byte(`"FORMAT"`), 1))
		f.Add(bytes.ReplaceAll(b, []byte("\n"), nil))
	}
	f.Add([]byte(`{"format":"klatch-tiers/1","tiers":[{"name":"a","soak_hours":-0}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		same := func(v interface{ Encode() ([]byte, error) }, err error) bool {
			if err != nil {
				return false
			}
			again, err := v.Encode()
			if err != nil || !bytes.Equal(again, b) {
				t.Fatalf("%q was read and is written as %q, %v", b, again, err)
			}
			return true
		}
		if s, err := ParseSelection(b); same(s, err) && (strings.Contains(s.Target, "..") || strings.Count(SelectPath(s.Tier, s.Kernel.ID), "/") != 2) {
			t.Errorf("paths of %+v", s)
		}
		if p, err := ParsePromotion(b); same(p, err) && strings.Count(PromotionPath(p.Tier, p.SHA256), "/") != 2 {
			t.Errorf("paths of %+v", p)
		}
		tiers, err := ParseTiers(b)
		same(tiers, err)
		if a, err := ParseAnchor(b, true); err == nil {
			same(a, nil)
		}
	})
}
