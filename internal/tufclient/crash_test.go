// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufrepo"
)

// TestRefreshSurvives lets each write of the memory fail once: the next
// refresh works, and an older repository is still refused whenever the newer
// state was reached.
func TestRefreshSurvives(t *testing.T) {
	start := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	broken := errors.New("broken disk")
	for _, effect := range []bool{false, true} {
		for n := 0; ; n++ {
			r := tufsim.New(t, "good", start)
			r.Publish(start, tufrepo.Target{Path: "a", Content: []byte("1")})
			base, client, err := Source(r.Dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			cfg := Config{Root: r.Root, Dir: filepath.Join(t.TempDir(), "tuf"), BaseURL: base, Client: client, Now: start}
			if _, err := Refresh(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
			old := r.Read("metadata/timestamp.json")
			r.Publish(start.Add(time.Hour), tufrepo.Target{Path: "b", Content: []byte("2")})
			cfg.Now = start.Add(time.Hour)
			left, wroteTimestamp := n, false
			_, err = refresh(t.Context(), cfg, func(name string, b []byte, mode fs.FileMode) error {
				fail := left == 0
				if left--; fail && !effect {
					return broken
				}
				wroteTimestamp = wroteTimestamp || filepath.Base(name) == "timestamp.json"
				if err := durable.WriteFile(name, b, mode); err != nil || fail {
					return errors.Join(err, broken)
				}
				return nil
			})
			if err == nil {
				if n < 4 {
					t.Fatalf("only %d writes were tried", n)
				}
				break
			}
			now := r.Read("metadata/timestamp.json")
			r.Write("metadata/timestamp.json", old)
			_, err = Refresh(t.Context(), cfg)
			if got := fault.CodeOf(err) == codeRollback; got != wroteTimestamp {
				t.Errorf("write %d, effect %v: old repository: %v", n, effect, err)
			}
			r.Write("metadata/timestamp.json", now)
			if s, err := Refresh(t.Context(), cfg); err != nil || len(s.Targets()) != 2 {
				t.Errorf("write %d, effect %v: next refresh: %v", n, effect, err)
			}
			if left, _ := filepath.Glob(filepath.Join(cfg.Dir, ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		}
	}
}

func TestDamagedMemoryIsNamed(t *testing.T) {
	start := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	r := tufsim.New(t, "good", start)
	r.Publish(start, tufrepo.Target{Path: "a", Content: []byte("1")})
	base, client, err := Source(r.Dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"timestamp.json", "snapshot.json", "targets.json", "memory.json", "root.json"} {
		cfg := Config{Root: r.Root, Dir: filepath.Join(t.TempDir(), "tuf"), BaseURL: base, Client: client, Now: start}
		if _, err := Refresh(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.Dir, name), []byte("{torn"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Refresh(t.Context(), cfg); fault.CodeOf(err) != "state_malformed" {
			t.Errorf("%s: %v", name, err)
		}
		if err := os.RemoveAll(cfg.Dir); err != nil {
			t.Fatal(err)
		}
		if _, err := Refresh(t.Context(), cfg); err != nil {
			t.Errorf("%s: after the hint: %v", name, err)
		}
	}
}
