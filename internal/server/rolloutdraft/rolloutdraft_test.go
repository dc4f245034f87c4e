// SPDX-License-Identifier: Apache-2.0

package rolloutdraft_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	. "klatch/internal/server/rolloutdraft"
	"klatch/internal/testkit/opsim"
	"klatch/internal/tufrepo"
)

var start = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

// draft is a promotion to stable that nobody has signed.
func draft(t testing.TB) (*opsim.Operator, *Draft) { return draftAt(t, "stable") }

// draftAt has the promotion under the path of a tier.
func draftAt(t testing.TB, tier string) (*opsim.Operator, *Draft) {
	o := opsim.New(t, "ops", start, rollout.Tier{Name: "canary"}, rollout.Tier{Name: "stable", SoakHours: 24})
	p := rollout.Promotion{Format: rollout.PromotionFormat, Tier: "stable", Target: "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb",
		SHA256: strings.Repeat("ab", 32), Since: start, PromotedAt: start, Reason: "canaries are well"}
	b, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := rollout.PromotionPath(tier, p.SHA256)
	m, err := tufrepo.Repository{Dir: o.Dir}.PreparePublication(t.Context(), tufrepo.Publication{Targets: []tufrepo.Target{{Path: path, Content: b}}}, "test", start)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := tufrepo.Roots(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return o, &Draft{Format: Format, Operator: "ops", Roots: roots, Metadata: m, Files: map[string][]byte{path: b}}
}

func TestDraftTravelsAndIsSigned(t *testing.T) {
	o, d := draft(t)
	for _, k := range o.Promotion[:2] {
		b, err := d.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if d, err = Parse(b); err != nil {
			t.Fatal(err)
		}
		if roles, err := d.Sign(o.Anchor, k); err != nil || len(roles) != 1 {
			t.Fatal(roles, err)
		}
	}
	if missing, err := d.Metadata.Missing(); err != nil || len(missing) != 0 {
		t.Errorf("%+v, %v", missing, err)
	}
	if p := d.Promotions(); len(p) != 1 || p[0].Tier != "stable" {
		t.Errorf("%+v", p)
	}
	if _, ok := d.Tiers(); ok {
		t.Error("a draft without tiers has some")
	}
	d.Operator = "others"
	if _, err := d.Sign(o.Anchor, o.Promotion[2]); fault.CodeOf(err) != "draft_of_another" {
		t.Error(err)
	}
}

func TestDraftsAreRefused(t *testing.T) {
	_, d := draft(t)
	good, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	set := func(change func(map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		change(m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	part := func(m map[string]any) map[string]any {
		return m["draft"].(map[string]any)["parts"].([]any)[0].(map[string]any)
	}
	file := func(m map[string]any, change func(target map[string]any)) {
		for _, f := range part(m)["metadata"].(map[string]any)["signed"].(map[string]any)["targets"].(map[string]any) {
			change(f.(map[string]any))
		}
	}
	_, other := draftAt(t, "early")
	wrongPath, err := other.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for want, b := range map[string][]byte{
		"which people do not": set(func(m map[string]any) {
			part(m)["role"] = "snapshot"
		}),
		"not what would be signed": set(func(m map[string]any) { clear(m["files"].(map[string]any)) }),
		"or not what would": set(func(m map[string]any) {
			file(m, func(f map[string]any) { f["length"] = f["length"].(float64) + 1 })
		}),
		"is not there or not": set(func(m map[string]any) {
			file(m, func(f map[string]any) { f["hashes"] = map[string]any{"sha256": strings.Repeat("ab", 32)} })
		}),
		"1 files that it does not name":          set(func(m map[string]any) { m["files"].(map[string]any)["x"] = "eA==" }),
		"holds the promotion of debian-12/amd64": wrongPath,
	} {
		if _, err := Parse(b); fault.CodeOf(err) != "bad_draft" || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
	for name, b := range map[string][]byte{
		"nothing":                nil,
		"bytes after the end":    append(bytes.Clone(good), '{'),
		"endless":                append(bytes.Clone(good), bytes.Repeat([]byte{' '}, Max)...),
		"another format":         set(func(m map[string]any) { m["format"] = "klatch-rollout-draft/2" }),
		"no operator":            set(func(m map[string]any) { m["operator"] = "" }),
		"an unknown member":      set(func(m map[string]any) { m["urgent"] = true }),
		"no metadata":            set(func(m map[string]any) { m["draft"] = nil }),
		"a part for the server":  set(func(m map[string]any) { part(m)["role"] = "snapshot" }),
		"a part for another one": set(func(m map[string]any) { part(m)["role"] = "debian-12-amd64" }),
		"a part for the select":  set(func(m map[string]any) { part(m)["role"] = "select" }),
		"no lists in force": set(func(m map[string]any) {
			delete(m["draft"].(map[string]any), "lists")
			clear(m["files"].(map[string]any))
		}),
		"foreign lists in force": set(func(m map[string]any) {
			l := m["draft"].(map[string]any)["lists"].(map[string]any)
			l["select"] = l["promotion"]
		}),
	} {
		if _, err := Parse(b); fault.CodeOf(err) != "bad_draft" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseDraft(f *testing.F) {
	_, d := draft(f)
	good, err := d.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"role": "promotion"`), []byte(`"role": "targets"`), 1))
	f.Add(bytes.Replace(good, []byte(`"version": `), []byte(`"version": -`), 1))
	f.Add([]byte(`{"format":"klatch-rollout-draft/1","operator":"a","draft":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Parse(b)
		if err != nil {
			return
		}
		// What is read can be told, and travels on.
		if _, err := d.Words(); err != nil {
			t.Errorf("no words for %q: %v", b, err)
		}
		again, err := d.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(again); err != nil {
			t.Errorf("what was written is not read: %v", err)
		}
	})
}
