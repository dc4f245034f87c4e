// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"crypto"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

var start = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func signers(name string, n int) (keys []crypto.Signer) {
	for i := range n {
		seed := make([]byte, ed25519.SeedSize)
		copy(seed, fmt.Sprintf("%d %s", i, name))
		keys = append(keys, ed25519.NewKeyFromSeed(seed))
	}
	return keys
}

func testKeys() Keys {
	return Keys{
		Root:      Role{signers("root", 3), 2},
		Targets:   Role{signers("targets", 2), 2},
		Snapshot:  Role{signers("snapshot", 1), 1},
		Timestamp: Role{signers("timestamp", 1), 1},
	}
}

// dirFetcher lets go-tuf's own client read the folder: what it accepts is
// what counts.
type dirFetcher string

func (d dirFetcher) DownloadFile(address string, _ int64, _ time.Duration) ([]byte, error) {
	b, err := os.ReadFile(string(d) + address[len("file://"):])
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &metadata.ErrDownloadHTTP{StatusCode: 404, URL: address}
	}
	return b, err
}

// accepted returns the targets that a new client sees. ok is false when there
// is no timestamp yet.
func accepted(t *testing.T, dir string, root []byte, now time.Time) (targets []string, ok bool) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(dir, "metadata", "timestamp.json")); err != nil {
		return nil, false
	}
	c, err := config.New("file:///metadata", root)
	if err != nil {
		t.Fatal(err)
	}
	c.RemoteTargetsURL, c.DisableLocalCache, c.Fetcher = "file:///targets", true, dirFetcher(dir)
	u, err := updater.New(c)
	if err != nil {
		t.Fatal(err)
	}
	u.UnsafeSetRefTime(now)
	if err := u.Refresh(); err != nil {
		t.Fatalf("a client refuses the repository: %v", err)
	}
	for name, f := range u.GetTopLevelTargets() {
		f.Path = name
		if _, _, err := u.DownloadTarget(f, filepath.Join(t.TempDir(), "x"), ""); err != nil {
			t.Fatalf("a client cannot get %s: %v", name, err)
		}
		targets = append(targets, name)
	}
	return targets, true
}

func TestPublishIsSeenByAClient(t *testing.T) {
	dir, keys := t.TempDir(), testKeys()
	root, err := Init(t.Context(), dir, keys, start)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), dir, keys, start); fault.CodeOf(err) != "repository_exists" {
		t.Errorf("second init: %v", err)
	}
	one := Target{Path: "debian-12/amd64/6.1.0-50/klatch_1.lpb", Content: []byte("one"), Custom: json.RawMessage(`{"sequence": 1}`)}
	two := Target{Path: "debian-12/amd64/6.1.0-50/klatch_2.lpb", Content: []byte("two")}
	r, err := Publish(t.Context(), dir, Publication{Targets: []Target{one}}, keys, start)
	if err != nil || !r.Changed {
		t.Fatal(r, err)
	}
	again, err := Publish(t.Context(), dir, Publication{Targets: []Target{one}}, keys, start)
	if err != nil || again.Changed || again.Timestamp != r.Timestamp {
		t.Errorf("publishing the same again: %+v, %v", again, err)
	}
	if _, err := Publish(t.Context(), dir, Publication{Targets: []Target{two}}, keys, start); err != nil {
		t.Fatal(err)
	}
	if got, _ := accepted(t, dir, root, start); len(got) != 2 {
		t.Errorf("client sees %v", got)
	}
	one.Content = []byte("ONE")
	if _, err := Publish(t.Context(), dir, Publication{Targets: []Target{one}}, keys, start); fault.CodeOf(err) != "target_exists" {
		t.Errorf("other content under a taken name: %v", err)
	}
	if _, err := Publish(t.Context(), dir, Publication{Withdraw: []string{two.Path}}, keys, start); err != nil {
		t.Fatal(err)
	}
	if got, _ := accepted(t, dir, root, start); len(got) != 1 || got[0] != one.Path {
		t.Errorf("client sees %v", got)
	}
}

// TestWhatIsSaidAnewTakesTheOldOnesPlace: a target that may be replaced is, and
// the metadata before still leads to what it named.
func TestWhatIsSaidAnewTakesTheOldOnesPlace(t *testing.T) {
	dir, keys := t.TempDir(), testKeys()
	root, err := Init(t.Context(), dir, keys, start)
	if err != nil {
		t.Fatal(err)
	}
	said := Target{Path: "notices/1/a.json", Content: []byte("old"), Replace: true}
	kept := Target{Path: "x/klatch_1.lpb", Content: []byte("1")}
	var versions []int64
	for _, content := range []string{"old", "old", "new", "new", "old"} {
		said.Content = []byte(content)
		r, err := Publish(t.Context(), dir, Publication{Targets: []Target{kept, said}}, keys, start)
		if err != nil {
			t.Fatal(err)
		}
		versions = append(versions, r.Targets)
		if got, ok := accepted(t, dir, root, start); !ok || len(got) != 2 {
			t.Errorf("client sees %v", got)
		}
		if h, err := newDisk(dir, nil).load(); err != nil || hex.EncodeToString(h.top().Signed.Targets[said.Path].Hashes["sha256"]) != digest([]byte(content)) {
			t.Errorf("%q is not what the metadata names: %v", content, err)
		}
	}
	if want := []int64{1, 1, 2, 2, 3}; !slices.Equal(versions, want) {
		t.Errorf("versions of the targets %v, want %v", versions, want)
	}
	for _, content := range []string{"old", "new"} {
		if _, err := os.Stat(filepath.Join(dir, "targets", "notices", "1", digest([]byte(content))+".a.json")); err != nil {
			t.Error(err)
		}
	}
}

func TestPublishRefuses(t *testing.T) {
	dir, keys := t.TempDir(), testKeys()
	if _, err := Publish(t.Context(), dir, Publication{}, keys, start); fault.CodeOf(err) != "repository_missing" {
		t.Errorf("no root: %v", err)
	}
	if _, err := Init(t.Context(), dir, keys, start); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"", "/a", "a/", "../a", "a/../b", "a//b", ".a", "a b", "a\\b", "a/\x00"} {
		if _, err := Publish(t.Context(), dir, Publication{Targets: []Target{{Path: p}}}, keys, start); fault.CodeOf(err) != "bad_target_path" {
			t.Errorf("path %q: %v", p, err)
		}
	}
	few := keys
	few.Targets.Signers = few.Targets.Signers[:1]
	if _, err := Publish(t.Context(), dir, Publication{Targets: []Target{{Path: "a"}}}, few, start); fault.CodeOf(err) != "keys_not_in_root" {
		t.Errorf("one signer too few: %v", err)
	}
	if _, ok := accepted(t, dir, nil, start); ok {
		t.Error("something was published")
	}
	if _, err := Publish(t.Context(), dir, Publication{}, keys, start.Add(RootLife+time.Hour)); fault.CodeOf(err) != "metadata_expired" {
		t.Errorf("expired root: %v", err)
	}
	unlock, err := newDisk(dir, nil).lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Refresh(t.Context(), dir, keys, start); fault.CodeOf(err) != "locked" {
		t.Errorf("two at once: %v", err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
}

func TestRefreshSignsWhatIsHalfGone(t *testing.T) {
	dir, keys := t.TempDir(), testKeys()
	root, err := Init(t.Context(), dir, keys, start)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Publish(t.Context(), dir, Publication{Targets: []Target{{Path: "a"}}}, keys, start); err != nil {
		t.Fatal(err)
	}
	online := Keys{Snapshot: keys.Snapshot, Timestamp: keys.Timestamp}
	for _, tt := range []struct {
		after                        time.Duration
		keys                         Keys
		targets, snapshot, timestamp int64
	}{
		{time.Hour, online, 1, 1, 1},
		{25 * time.Hour, online, 1, 1, 2},
		{4 * 24 * time.Hour, online, 1, 2, 3},
		{31 * 24 * time.Hour, online, 1, 3, 4},
		{31 * 24 * time.Hour, keys, 2, 4, 5},
	} {
		r, err := Refresh(t.Context(), dir, tt.keys, start.Add(tt.after))
		if err != nil {
			t.Fatal(err)
		}
		if r.Targets != tt.targets || r.Snapshot != tt.snapshot || r.Timestamp != tt.timestamp {
			t.Errorf("after %s: %+v, want %d %d %d", tt.after, r, tt.targets, tt.snapshot, tt.timestamp)
		}
		accepted(t, dir, root, start.Add(tt.after))
	}
}

// TestPublishSurvives lets each write of a publication fail once, before and
// after its effect: a client accepts the repository at that moment, and the
// same call then completes it.
func TestPublishSurvives(t *testing.T) {
	broken := errors.New("broken disk")
	keys := testKeys()
	first := Publication{Targets: []Target{{Path: "x/one", Content: []byte("1")}}}
	second := Publication{Targets: []Target{{Path: "x/two", Content: []byte("2")}, {Path: "y/three", Content: []byte("3")}}}
	for _, effect := range []bool{false, true} {
		for n := 0; ; n++ {
			dir := t.TempDir()
			root, err := Init(t.Context(), dir, keys, start)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Publish(t.Context(), dir, first, keys, start); err != nil {
				t.Fatal(err)
			}
			left := n
			d := newDisk(dir, nil)
			step := func() error {
				if left--; left == -1 {
					return broken
				}
				return nil
			}
			d.write = func(name string, b []byte, mode fs.FileMode) error {
				err := step()
				if err != nil && !effect {
					return err
				}
				return errors.Join(durable.WriteFile(name, b, mode), err)
			}
			d.mkdir = func(name string, mode fs.FileMode) error {
				err := step()
				if err != nil && !effect {
					return err
				}
				return errors.Join(os.MkdirAll(name, mode), err)
			}
			_, err = d.publish(t.Context(), second, keys, start.Add(time.Hour))
			if err == nil {
				if n < 5 {
					t.Fatalf("only %d operations were tried", n)
				}
				break
			}
			if !errors.Is(err, broken) {
				t.Fatal(err)
			}
			if got, ok := accepted(t, dir, root, start.Add(time.Hour)); !ok || (len(got) != 1 && len(got) != 3) {
				t.Errorf("operation %d, effect %v: client sees %v", n, effect, got)
			}
			if _, err := Publish(t.Context(), dir, second, keys, start.Add(2*time.Hour)); err != nil {
				t.Errorf("operation %d, effect %v: second try: %v", n, effect, err)
			}
			if got, _ := accepted(t, dir, root, start.Add(2*time.Hour)); len(got) != 3 {
				t.Errorf("operation %d, effect %v: client sees %v at the end", n, effect, got)
			}
		}
	}
}
