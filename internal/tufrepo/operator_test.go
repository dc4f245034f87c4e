// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/tufclient"
)

// operator is a folder with select 1 of 1 and promotion 2 of 2.
func operator(t *testing.T) (dir string, root []byte, keys Keys) {
	t.Helper()
	dir, keys = t.TempDir(), testKeys()
	root, err := Init(t.Context(), dir, keys, start)
	if err != nil {
		t.Fatal(err)
	}
	people := signers("promotion", 2)
	server := signers("select", 1)
	keys.Release.Signers = append(slices.Clone(server), people...)
	p := Publication{
		Targets: []Target{{Path: "policy/tiers.json", Content: []byte("tiers")}},
		Operator: []OperatorRole{
			{RoleSelect, []crypto.PublicKey{server[0].Public()}, 1},
			{RolePromotion, []crypto.PublicKey{people[0].Public(), people[1].Public()}, 2},
		},
	}
	if _, err := Publish(t.Context(), dir, p, keys, start); err != nil {
		t.Fatal(err)
	}
	return dir, root, keys
}

// sees is what a machine reads, as "path=content", through its memory of what
// it saw before.
func sees(t *testing.T, dir, memory string, root []byte, now time.Time) (string, error) {
	t.Helper()
	s, err := tufclient.Refresh(t.Context(), tufclient.Config{Root: root, Dir: memory, Now: now, Operator: &tufclient.Operator{Approvers: 1},
		BaseURL: "file://localhost", Client: &http.Client{Transport: tufclient.DirTransport(dir)}})
	if err != nil {
		return "", err
	}
	var out []string
	for _, target := range s.Targets() {
		b, err := s.Download(t.Context(), target, 1<<10)
		if err != nil {
			return "", err
		}
		out = append(out, fmt.Sprintf("%s=%s", target.Path, b))
	}
	return strings.Join(out, " "), nil
}

// TestOperatorSurvives: a server selects anew, and completes a promotion; each
// file operation fails once, before and after its effect. A machine, with its
// memory, accepts the repository at that moment, sees all of the old or all of
// the new, and the same call then completes it.
func TestOperatorSurvives(t *testing.T) {
	broken := errors.New("broken disk")
	const tiers = "policy/tiers.json=tiers"
	later := start.Add(time.Hour)
	for name, do := range map[string]struct {
		run  func(ctx context.Context, d disk, keys Keys, draft *Draft) error
		want string
	}{
		"select": {func(ctx context.Context, d disk, keys Keys, _ *Draft) error {
			online := Keys{Release: Role{Signers: keys.Release.Signers[:1]}, Snapshot: keys.Snapshot, Timestamp: keys.Timestamp}
			_, err := d.publish(ctx, Publication{Targets: []Target{{Path: "select/canary/k.json", Content: []byte("2"), Replace: true}}, Withdraw: []string{"select/stable/k.json"}}, online, later)
			return err
		}, tiers + " select/canary/k.json=2"},
		"promotion": {func(ctx context.Context, d disk, keys Keys, draft *Draft) error {
			if err := d.putTarget(Target{Path: "promotion/stable/x.json", Content: []byte("p")}); err != nil {
				return err
			}
			_, err := d.complete(ctx, draft, Keys{Snapshot: keys.Snapshot, Timestamp: keys.Timestamp}, later)
			return err
		}, "policy/tiers.json=tiers promotion/stable/x.json=p select/canary/k.json=1 select/stable/k.json=1"},
	} {
		old := tiers + " select/canary/k.json=1 select/stable/k.json=1"
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, effect := range []bool{false, true} {
				for n := 0; ; n++ {
					dir, root, keys := operator(t)
					first := Publication{Targets: []Target{{Path: "select/canary/k.json", Content: []byte("1")}, {Path: "select/stable/k.json", Content: []byte("1")}}}
					if _, err := Publish(t.Context(), dir, first, keys, start); err != nil {
						t.Fatal(err)
					}
					memory := t.TempDir()
					if got, err := sees(t, dir, memory, root, start); err != nil || got != old {
						t.Fatal(got, err)
					}
					draft, err := Repository{Dir: dir}.PreparePublication(t.Context(), Publication{Targets: []Target{{Path: "promotion/stable/x.json", Content: []byte("p")}}}, "test", start)
					if err == nil {
						_, err = draft.Sign(keys.Release.Signers...)
					}
					if err != nil {
						t.Fatal(err)
					}
					left := n
					d := newDisk(dir, nil)
					step := func(do func() error) error {
						if left--; left != -1 {
							return do()
						}
						if effect {
							return errors.Join(do(), broken)
						}
						return broken
					}
					d.write = func(name string, b []byte, mode fs.FileMode) error {
						return step(func() error { return durable.WriteFile(name, b, mode) })
					}
					d.mkdir = func(name string, mode fs.FileMode) error {
						return step(func() error { return os.MkdirAll(name, mode) })
					}
					err = do.run(t.Context(), d, keys, draft)
					if err == nil {
						if n < 5 {
							t.Fatalf("only %d operations were tried", n)
						}
						break
					}
					if !errors.Is(err, broken) {
						t.Fatal(err)
					}
					if got, err := sees(t, dir, memory, root, later); err != nil || got != old && got != do.want {
						t.Errorf("operation %d, effect %v: a machine sees %q, %v", n, effect, got, err)
					}
					if err := do.run(t.Context(), newDisk(dir, nil), keys, draft); err != nil {
						t.Errorf("operation %d, effect %v: second try: %v", n, effect, err)
					}
					if got, err := sees(t, dir, memory, root, later); err != nil || got != do.want {
						t.Errorf("operation %d, effect %v: at the end a machine sees %q, %v", n, effect, got, err)
					}
				}
			}
		})
	}
}

func TestOperatorsTreeIsNeverAnother(t *testing.T) {
	dir, _, keys := operator(t)
	role := ReleaseRole{Distro: "debian-12", Arch: "amd64", Keys: []crypto.PublicKey{keys.Root.Signers[0].Public()}, Threshold: 1}
	if _, err := Publish(t.Context(), dir, Publication{Roles: []ReleaseRole{role}}, keys, start); fault.CodeOf(err) != "bad_role" {
		t.Errorf("a release role beside them: %v", err)
	}
	if _, err := Prepare(t.Context(), dir, Change{Drop: []string{RolePromotion}}, start); fault.CodeOf(err) != "no_role" {
		t.Errorf("without promotion: %v", err)
	}
	if _, err := Prepare(t.Context(), dir, Change{Threshold: map[string]int{RolePromotion: 1}, AtLeast: 2}, start); fault.CodeOf(err) != "bad_threshold" {
		t.Errorf("one approver: %v", err)
	}
	for name, roles := range map[string][]OperatorRole{
		"one of the two": {{RoleSelect, role.Keys, 1}},
		"one twice":      {{RoleSelect, role.Keys, 1}, {RoleSelect, role.Keys, 1}},
		"another one":    {{RoleSelect, role.Keys, 1}, {"extra", role.Keys, 1}},
		"no keys":        {{RoleSelect, role.Keys, 1}, {RolePromotion, nil, 1}},
	} {
		fresh := t.TempDir()
		if _, err := Init(t.Context(), fresh, testKeys(), start); err != nil {
			t.Fatal(err)
		}
		if _, err := Publish(t.Context(), fresh, Publication{Operator: roles}, testKeys(), start); fault.CodeOf(err) != "bad_role" {
			t.Errorf("%s: %v", name, err)
		}
	}
	s, err := Look(dir)
	if err != nil || s.Role(RoleSelect).Life != SelectLife || s.Role("timestamp").Life != SelectLife || s.Role(RolePromotion).Life != PromotionLife || s.Role("targets").Life != TargetsLife {
		t.Errorf("lives %+v, %v", s, err)
	}
}

// A server that has forgotten its versions takes ones that it is told are
// free.
func TestLeastVersionIsTaken(t *testing.T) {
	dir, root, keys := operator(t)
	r := Repository{Dir: dir, Least: func(string) int64 { return 1000 }}
	res, err := r.Publish(t.Context(), Publication{Targets: []Target{{Path: "select/canary/k.json", Content: []byte("1")}}}, keys, start)
	if err != nil || res.Timestamp != 1000 || res.Snapshot != 1000 || res.Release[RoleSelect] != 1000 || res.Targets != 1 {
		t.Errorf("%+v, %v", res, err)
	}
	if res, err = r.Publish(t.Context(), Publication{Withdraw: []string{"select/canary/k.json"}}, keys, start); err != nil || res.Timestamp != 1001 || res.Release[RoleSelect] != 1001 {
		t.Errorf("%+v, %v", res, err)
	}
	if _, err := sees(t, dir, t.TempDir(), root, start); err != nil {
		t.Error(err)
	}
}

// Grew follows roots from a holder's anchor, and nothing else.
func TestDraftGrowsFromTheAnchor(t *testing.T) {
	dir, root, keys := operator(t)
	renew := func() *Draft {
		t.Helper()
		d, err := Prepare(t.Context(), dir, Change{Renew: []string{"root"}}, start)
		if err == nil {
			_, err = d.Sign(keys.Root.Signers...)
		}
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for range 2 {
		if _, err := Complete(t.Context(), dir, renew(), keys, start); err != nil {
			t.Fatal(err)
		}
	}
	d := renew()
	roots, err := Roots(dir)
	if err != nil || len(roots) != 3 {
		t.Fatal(len(roots), err)
	}
	for name, tt := range map[string]struct {
		anchor []byte
		roots  []json.RawMessage
		ok     bool
	}{
		"from the first":   {root, roots, true},
		"from the second":  {roots[1], roots, true},
		"from the last":    {roots[2], nil, true},
		"one left out":     {root, []json.RawMessage{roots[0], roots[2]}, false},
		"the last one too": {root, roots[:2], false},
		"no root":          {[]byte("{}"), roots, false},
		"an endless list":  {root, slices.Repeat(roots[:1], maxRoots+1), false},
	} {
		if err := d.Grew(tt.anchor, tt.roots); (err == nil) != tt.ok || !tt.ok && fault.CodeOf(err) != "draft_of_another" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
