// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

const (
	debian  = "debian-12/amd64/6.1.0-50/klatch_1.lpb"
	debian2 = "debian-12/amd64/6.1.0-50/klatch_2.lpb"
)

func release(n int) ReleaseRole {
	r := ReleaseRole{Distro: "debian-12", Arch: "amd64", Threshold: 2}
	for _, s := range signers("release", n) {
		r.Keys = append(r.Keys, s.Public())
	}
	return r
}

// grown is a repository with a release role and one livepatch.
func grown(t *testing.T) (dir string, root []byte, keys Keys) {
	t.Helper()
	dir, keys = t.TempDir(), testKeys()
	keys.Release.Signers = signers("release", 3)
	root, err := Init(t.Context(), dir, keys, start)
	if err != nil {
		t.Fatal(err)
	}
	p := Publication{Targets: []Target{{Path: debian, Content: []byte("1")}}, Roles: []ReleaseRole{release(3)}}
	if r, err := Publish(t.Context(), dir, p, keys, start); err != nil || r.Release["debian-12-amd64"] != 1 {
		t.Fatal(r, err)
	}
	return dir, root, keys
}

// see is a client with a memory; it returns whether it finds a target.
type see struct {
	root   []byte
	memory string
}

func (s see) target(dir, name string, now time.Time) error {
	c, err := config.New("file:///metadata", s.root)
	if err != nil {
		return err
	}
	c.RemoteTargetsURL, c.LocalMetadataDir, c.LocalTargetsDir, c.Fetcher = "file:///targets", s.memory, s.memory, dirFetcher(dir)
	u, err := updater.New(c)
	if err != nil {
		return err
	}
	u.UnsafeSetRefTime(now)
	_, err = u.GetTargetInfo(name)
	return err
}

func TestReleaseRoleTakesOverItsTargets(t *testing.T) {
	dir, keys := t.TempDir(), testKeys()
	root, err := Init(t.Context(), dir, keys, start)
	if err != nil {
		t.Fatal(err)
	}
	flat := Publication{Targets: []Target{{Path: debian, Content: []byte("1")}, {Path: "policy/x", Content: []byte("p")}}}
	if _, err := Publish(t.Context(), dir, flat, keys, start); err != nil {
		t.Fatal(err)
	}
	c := see{root, t.TempDir()}
	if err := c.target(dir, debian, start); err != nil {
		t.Fatal(err)
	}
	keys.Release.Signers = signers("release", 3)
	if _, err := Publish(t.Context(), dir, Publication{Roles: []ReleaseRole{release(3)}}, keys, start); err != nil {
		t.Fatal(err)
	}
	s, err := Look(dir)
	if err != nil {
		t.Fatal(err)
	}
	if top, own := s.Role("targets").Targets, s.Role("debian-12-amd64").Targets; len(top) != 1 || len(own) != 1 || own[0] != debian || s.For(debian).Name != "debian-12-amd64" {
		t.Errorf("top list %v, release role %v", top, own)
	}
	if err := c.target(dir, debian, start); err != nil {
		t.Errorf("after the move: %v", err)
	}
	again, err := Publish(t.Context(), dir, flat, keys, start)
	if err != nil || again.Changed {
		t.Errorf("the same publication again: changed %v, %v", again.Changed, err)
	}
}

// TestDraftIsSignedBySeveralPeople: the publishing host has the online keys
// only. Two holders sign copies; a third signature by a stranger counts
// nothing.
func TestDraftIsSignedBySeveralPeople(t *testing.T) {
	dir, root, keys := grown(t)
	online := Keys{Snapshot: keys.Snapshot, Timestamp: keys.Timestamp}
	p := Publication{Targets: []Target{{Path: debian2, Content: []byte("2")}}}
	res, err := Publish(t.Context(), dir, p, online, start)
	if fault.CodeOf(err) != "keys_not_in_role" || res.Draft == nil || len(res.Draft.Parts) != 1 {
		t.Fatalf("%+v, %v", res, err)
	}
	c := see{root, t.TempDir()}
	if err := c.target(dir, debian2, start); err == nil {
		t.Fatal("offered before it was signed")
	}
	carry := func(d *Draft, keys ...crypto.Signer) *Draft {
		b, err := d.Encode()
		if err != nil {
			t.Fatal(err)
		}
		copied, err := ParseDraft(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(keys) > 0 {
			if _, err := copied.Sign(keys...); err != nil {
				t.Fatal(err)
			}
		}
		return copied
	}
	words, err := res.Draft.Words()
	if err != nil || !strings.Contains(strings.Join(words, "\n"), debian2) {
		t.Errorf("words %q, %v", words, err)
	}
	anna := carry(res.Draft, keys.Release.Signers[0])
	if _, err := Complete(t.Context(), dir, carry(anna, signers("evil", 1)[0]), online, start); fault.CodeOf(err) != "keys_not_in_role" {
		t.Errorf("one holder and a stranger: %v", err)
	}
	forged := carry(anna)
	forged.Parts[0].Metadata = json.RawMessage(strings.Replace(string(forged.Parts[0].Metadata), `"signatures":[`,
		`"signatures":[{"keyid":"`+mustID(t, keys.Release.Signers[1])+`","sig":"00"},`, 1))
	if _, err := Complete(t.Context(), dir, forged, online, start); fault.CodeOf(err) != "keys_not_in_role" {
		t.Errorf("a signature that is none: %v", err)
	}
	bert := carry(res.Draft, keys.Release.Signers[2])
	if err := anna.Merge(bert); err != nil {
		t.Fatal(err)
	}
	if m, err := anna.Missing(); err != nil || len(m) != 0 {
		t.Errorf("missing %+v, %v", m, err)
	}
	if _, err := Complete(t.Context(), dir, anna, online, start); err != nil {
		t.Fatal(err)
	}
	if err := c.target(dir, debian2, start); err != nil {
		t.Error(err)
	}
	if r, err := Complete(t.Context(), dir, anna, online, start); err != nil || r.Changed {
		t.Errorf("completing again: %+v, %v", r, err)
	}
	other := carry(res.Draft)
	other.Parts = append(other.Parts, other.Parts[0])
	if err := anna.Merge(other); err == nil {
		t.Error("merged with another draft")
	}
}

func mustID(t *testing.T, s crypto.Signer) string {
	t.Helper()
	id, err := KeyID(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestDraftOfAnotherStateIsRefused(t *testing.T) {
	dir, _, keys := grown(t)
	draft, err := Prepare(t.Context(), dir, Change{Renew: []string{"debian-12-amd64"}}, start)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Publish(t.Context(), dir, Publication{Targets: []Target{{Path: debian2, Content: []byte("2")}}}, keys, start); err != nil {
		t.Fatal(err)
	}
	if _, err := Complete(t.Context(), dir, draft, keys, start); fault.CodeOf(err) != "draft_stale" {
		t.Errorf("draft from before the publication: %v", err)
	}
}

// TestAttackDraft: who prepares a draft also writes down what it differs from.
// Whatever that says, the words name every file that the signer would vouch for.
func TestAttackDraft(t *testing.T) {
	dir, _, _ := grown(t)
	draft, err := Prepare(t.Context(), dir, Change{Renew: []string{metadata.TARGETS}}, start)
	if err != nil {
		t.Fatal(err)
	}
	part := slices.IndexFunc(draft.Parts, func(p Part) bool { return p.Role == metadata.TARGETS })
	evil, err := metadata.Targets().FromBytes(draft.Parts[part].Metadata)
	if err != nil {
		t.Fatal(err)
	}
	evil.Signed.Targets["policy/evil.json"] = &metadata.TargetFiles{Length: 7, Hashes: metadata.Hashes{"sha256": make([]byte, 32)}}
	b, err := evil.ToBytes(false)
	if err != nil {
		t.Fatal(err)
	}
	draft.Parts[part].Metadata = b
	t.Run("Attack/M/a file that is added", func(t *testing.T) {
		words, err := draft.Words()
		if err != nil || !strings.Contains(strings.Join(words, "\n"), "NEW   policy/evil.json (7 bytes") {
			t.Errorf("%v: %q", err, words)
		}
	})
	// What a person reads must be the lines that we wrote, whoever chose names.
	for name, spoil := range map[string]func(*metadata.Metadata[metadata.TargetsType]){
		"a name that writes lines of its own": func(l *metadata.Metadata[metadata.TargetsType]) {
			l.Signed.Targets["a\n    0 files in all"] = l.Signed.Targets["policy/evil.json"]
		},
		"a name that turns the direction of writing": func(l *metadata.Metadata[metadata.TargetsType]) {
			l.Signed.Targets["a\u202e/b"] = l.Signed.Targets["policy/evil.json"]
		},
		"a name that a terminal obeys": func(l *metadata.Metadata[metadata.TargetsType]) {
			l.Signed.Targets["a/\x1b[2J"] = l.Signed.Targets["policy/evil.json"]
		},
		"a pattern that writes lines of its own": func(l *metadata.Metadata[metadata.TargetsType]) {
			l.Signed.Delegations.Roles[0].Paths = []string{"x\n    terminating: true"}
		},
	} {
		t.Run("Attack/M/"+name, func(t *testing.T) {
			l, err := metadata.Targets().FromBytes(b)
			if err != nil {
				t.Fatal(err)
			}
			spoil(l)
			forged := *draft
			forged.Parts = slices.Clone(draft.Parts)
			if forged.Parts[part].Metadata, err = l.ToBytes(false); err != nil {
				t.Fatal(err)
			}
			words, err := forged.Words()
			for _, w := range words {
				if strings.ContainsFunc(w, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("a person would read %q", w)
				}
			}
			if strings.HasPrefix(name, "a name") && err == nil {
				t.Errorf("taken: %q", words)
			}
		})
	}
	t.Run("Attack/M/a false list in force", func(t *testing.T) {
		forged := *draft
		forged.Targets = b
		if words, err := forged.Words(); err == nil {
			t.Errorf("taken: %q", words)
		}
	})
	t.Run("Attack/M/the list in force again", func(t *testing.T) {
		again := *draft
		again.Parts = slices.Clone(draft.Parts)
		again.Parts[part].Metadata = draft.Targets
		if words, err := again.Words(); err == nil {
			t.Errorf("taken: %q", words)
		}
	})
}

func TestChangesThatAreRefused(t *testing.T) {
	dir, _, keys := grown(t)
	id := mustID(t, keys.Targets.Signers[0])
	pub := func(name string) []crypto.PublicKey { return []crypto.PublicKey{signers(name, 1)[0].Public()} }
	for name, tt := range map[string]struct {
		c    Change
		want fault.Code
	}{
		"fewer keys than the threshold":         {Change{Remove: map[string][]string{"targets": {id}}}, "bad_threshold"},
		"a threshold of one outside lab":        {Change{Threshold: map[string]int{"debian-12-amd64": 1}, AtLeast: 2}, "bad_threshold"},
		"one key twice":                         {Change{Add: map[string][]crypto.PublicKey{"root": pub("root")}}, "bad_threshold"},
		"one key twice in a release role":       {Change{Add: map[string][]crypto.PublicKey{"debian-12-amd64": pub("release")}}, "bad_threshold"},
		"a role that is not there":              {Change{Renew: []string{"debian-99-amd64"}}, "no_role"},
		"the end of a role that is not there":   {Change{Drop: []string{"debian-99-amd64"}}, "no_role"},
		"a key that is not there":               {Change{Remove: map[string][]string{"root": {id}}}, "no_such_key"},
		"a role twice":                          {Change{Roles: []ReleaseRole{release(3)}}, "role_exists"},
		"a role whose name is a path":           {Change{Roles: []ReleaseRole{{Distro: "../x", Arch: "amd64", Threshold: 1, Keys: pub("x")}}}, "bad_role"},
		"a role whose name is that of another":  {Change{Roles: []ReleaseRole{{Distro: "debian", Arch: "12-amd64", Threshold: 1, Keys: pub("x")}}}, "role_exists"},
		"a role with a star":                    {Change{Roles: []ReleaseRole{{Distro: "*", Arch: "amd64", Threshold: 1, Keys: pub("x")}}}, "bad_role"},
		"a role with a threshold without a key": {Change{Roles: []ReleaseRole{{Distro: "debian-13", Arch: "amd64", Threshold: 2, Keys: pub("x")}}}, "bad_role"},
		"nothing":                               {Change{}, "nothing_to_do"},
	} {
		if _, err := Prepare(t.Context(), dir, tt.c, start); fault.CodeOf(err) != tt.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	var many []ReleaseRole
	for i := range maxRoles {
		many = append(many, ReleaseRole{Distro: "ubuntu-" + string(rune('1'+i%9)) + "." + string(rune('a'+i/9)), Arch: "amd64", Threshold: 1, Keys: pub("x")})
	}
	if _, err := Prepare(t.Context(), dir, Change{Roles: many}, start); fault.CodeOf(err) != "bad_role" {
		t.Errorf("33 roles: %v", err)
	}
}

// TestCompleteSurvives lets each file operation of a ceremony fail once, before
// and after its effect. With the old keys at hand a client accepts every
// moment; without them it accepts or stays, and never loses what it had. The
// same call then completes the work.
func TestCompleteSurvives(t *testing.T) {
	broken := errors.New("broken disk")
	fresh := func(keys *Keys, lost bool) Change {
		c := Change{Add: map[string][]crypto.PublicKey{}, Remove: map[string][]string{}}
		for role, r := range map[string]*Role{"root": &keys.Root, "targets": &keys.Targets, "snapshot": &keys.Snapshot, "timestamp": &keys.Timestamp} {
			old := r.Signers
			r.Signers = signers("new "+role, len(old))
			for i, s := range old {
				id, _ := KeyID(s.Public())
				c.Remove[role] = append(c.Remove[role], id)
				c.Add[role] = append(c.Add[role], r.Signers[i].Public())
			}
			if role == "root" || !lost { // the old root must sign the new one
				r.Signers = append(r.Signers, old...)
			}
		}
		return c
	}
	for name, tt := range map[string]struct {
		change   func(*Keys) Change
		seamless bool
	}{
		"all keys new, the old ones at hand": {func(k *Keys) Change { return fresh(k, false) }, true},
		"all keys new, the old ones lost":    {func(k *Keys) Change { return fresh(k, true) }, false},
		"a second release role": {func(k *Keys) Change {
			r := release(3)
			r.Distro = "debian-13"
			return Change{Roles: []ReleaseRole{r}}
		}, true},
		"a new root and nothing else": {func(*Keys) Change { return Change{Renew: []string{"root"}} }, true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, effect := range []bool{false, true} {
				for n := 0; ; n++ {
					dir, root, keys := grown(t)
					later := start.Add(time.Hour)
					known := see{root, t.TempDir()}
					if err := known.target(dir, debian, later); err != nil {
						t.Fatal(err)
					}
					draft, err := Prepare(t.Context(), dir, tt.change(&keys), later)
					if err != nil {
						t.Fatal(err)
					}
					d := failing(dir, n, effect, broken)
					_, err = d.complete(t.Context(), draft, keys, later)
					if err == nil {
						if n < 3 {
							t.Fatalf("only %d operations were tried", n)
						}
						break
					}
					if !errors.Is(err, broken) {
						t.Fatal(err)
					}
					err = known.target(dir, debian, later)
					if tt.seamless && err != nil {
						t.Errorf("operation %d, effect %v: a client that was up to date: %v", n, effect, err)
					}
					if err := (see{root, t.TempDir()}).target(dir, debian, later); tt.seamless && err != nil {
						t.Errorf("operation %d, effect %v: a new client: %v", n, effect, err)
					}
					if _, err := Complete(t.Context(), dir, draft, keys, later); err != nil {
						t.Fatalf("operation %d, effect %v: second try: %v", n, effect, err)
					}
					if err := known.target(dir, debian, later); err != nil {
						t.Errorf("operation %d, effect %v: at the end: %v", n, effect, err)
					}
					if s, err := Look(dir); err != nil || s.Unfinished {
						t.Errorf("unfinished %v, %v", s.Unfinished, err)
					}
				}
			}
		})
	}
}

// failing is a disk whose n-th operation fails, before or after its effect.
func failing(dir string, n int, effect bool, broken error) disk {
	d := newDisk(dir, nil)
	step := func(do func() error) error {
		n--
		if n != -1 {
			return do()
		}
		if !effect {
			return broken
		}
		return errors.Join(do(), broken)
	}
	d.write = func(name string, b []byte, mode fs.FileMode) error {
		return step(func() error { return durable.WriteFile(name, b, mode) })
	}
	d.mkdir = func(name string, mode fs.FileMode) error {
		return step(func() error { return os.MkdirAll(name, mode) })
	}
	d.remove = func(name string) error { return step(func() error { return durable.RemoveTemp(name) }) }
	return d
}

// TestPublishAfterABrokenCeremony: online keys were replaced, and the run died
// between root and timestamp. Signing again heals it.
func TestPublishAfterABrokenCeremony(t *testing.T) {
	dir, root, keys := grown(t)
	old := keys.Timestamp.Signers[0]
	keys.Timestamp.Signers = signers("new timestamp", 1)
	c := Change{Add: map[string][]crypto.PublicKey{"timestamp": {keys.Timestamp.Signers[0].Public()}}, Remove: map[string][]string{"timestamp": {mustID(t, old)}}}
	draft, err := Prepare(t.Context(), dir, c, start)
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(dir, nil)
	d.write = func(name string, b []byte, mode fs.FileMode) error {
		if filepath.Base(name) == "timestamp.json" {
			return context.Canceled
		}
		return durable.WriteFile(name, b, mode)
	}
	if _, err := d.complete(t.Context(), draft, keys, start); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if s, err := Look(dir); err != nil || !s.Unfinished {
		t.Errorf("not seen as unfinished: %v", err)
	}
	if _, err := Refresh(t.Context(), dir, keys, start); err != nil {
		t.Fatal(err)
	}
	if err := (see{root, t.TempDir()}).target(dir, debian, start); err != nil {
		t.Error(err)
	}
}
