// SPDX-License-Identifier: Apache-2.0

package livepatch

import (
	"bytes"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

func someRecalls() Recalls {
	return Recalls{Format: RecallsFormat, Version: 2, Issued: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		Entries: []Recall{{Kernel: kernel.BuildID{1}, Sequence: 2, Reason: "it eats files"}},
		Floors:  []Floor{{Kernel: kernel.BuildID{2}, Sequence: 4}}, Keys: []string{KeyDigest([]byte("key"))}}
}

func TestRecallsOnlyGrow(t *testing.T) {
	old := someRecalls()
	for name, tt := range map[string]struct {
		change func(*Recalls)
		want   bool
	}{
		"the same":              {func(*Recalls) {}, true},
		"one more":              {func(r *Recalls) { r.Entries = append(r.Entries, Recall{kernel.BuildID{1}, 3, "x"}) }, true},
		"a higher floor":        {func(r *Recalls) { r.Floors[0].Sequence = 5 }, true},
		"a floor over an entry": {func(r *Recalls) { r.Entries, r.Floors = nil, append(r.Floors, Floor{kernel.BuildID{1}, 9}) }, true},
		"an older version":      {func(r *Recalls) { r.Version = 1 }, false},
		"an entry less":         {func(r *Recalls) { r.Entries = nil }, false},
		"a lower floor":         {func(r *Recalls) { r.Floors[0].Sequence = 3 }, false},
		"a key less":            {func(r *Recalls) { r.Keys = nil }, false},
	} {
		r := someRecalls()
		tt.change(&r)
		if got := r.Holds(old); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestRecallsAreReadInOneForm(t *testing.T) {
	good, err := someRecalls().Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseRecalls(good); err != nil {
		t.Error(err)
	}
	for name, b := range map[string][]byte{
		"nothing":                 nil,
		"a space more":            append([]byte(" "), good...),
		"bytes after":             append(bytes.Clone(good), '{', '}'),
		"another format":          bytes.Replace(good, []byte(RecallsFormat), []byte("klatch-recalls/2"), 1),
		"version 0":               bytes.Replace(good, []byte(`"version": 2`), []byte(`"version": 0`), 1),
		"an unknown field":        bytes.Replace(good, []byte(`"version"`), []byte(`"more": 1, "version"`), 1),
		"no reason":               bytes.Replace(good, []byte("it eats files"), nil, 1),
		"a reason of two lines":   bytes.Replace(good, []byte("it eats files"), []byte(`it\neats`), 1),
		"a key that is no digest": bytes.Replace(good, []byte(KeyDigest([]byte("key"))), []byte("abc"), 1),
	} {
		if _, err := ParseRecalls(b); fault.CodeOf(err) != "recalls_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if RecallsVersion(RecallsPath(17)) != 17 || RecallsVersion("policy/recalls-0.note") != 0 || RecallsVersion("x/policy/recalls-1.note") != 0 ||
		RecallsVersion("policy/recalls-01.note") != 0 {
		t.Error("paths of recalls")
	}
}

func FuzzRecalls(f *testing.F) {
	good, err := someRecalls().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRecalls(b)
		if err != nil {
			return
		}
		again, err := r.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("another form: %v\n%s\n%s", err, b, again)
		}
	})
}
