// SPDX-License-Identifier: Apache-2.0

package ceremony_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/forge/ceremony"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/keyfile"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

var start = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

const (
	role   = "debian-12-amd64"
	folder = "debian-12/amd64/6.1.0-50-cloud-amd64/"
)

// made is one data folder of profile full with its keys, made once: an RSA key
// takes a while.
var made = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "klatch-drill-")
	if err != nil {
		return "", err
	}
	d, err := datadir.Make(dir, datadir.Policy{Publisher: "example.org", Profile: trust.Full})
	if err == nil {
		err = sign.MakeKeys(context.Background(), d, start)
	}
	if err == nil {
		_, err = sign.MakeReleaseKeys(d, "debian-12", "amd64")
	}
	return dir, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := made(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// drill is a publisher with several people, a machine that follows it, and a
// thief. People's keys are not in the data folder.
type drill struct {
	*testing.T
	d      datadir.Dir
	people map[string][]crypto.Signer // by role
	memory string
	mirror string // what the machine reads; the thief may write here
}

func newDrill(t *testing.T) *drill {
	t.Helper()
	dir, err := made()
	if err != nil {
		t.Fatal(err)
	}
	own := t.TempDir()
	if err := os.CopyFS(own, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	d, err := datadir.Open(own)
	if err != nil {
		t.Fatal(err)
	}
	w := &drill{T: t, d: d, people: map[string][]crypto.Signer{}, memory: t.TempDir(), mirror: t.TempDir()}
	keys, err := ceremony.Keys(d)
	w.check(err)
	r, _, err := sign.ReleaseKeys(d, "debian-12", "amd64")
	w.check(err)
	_, err = tufrepo.Publish(t.Context(), d.Repository(), tufrepo.Publication{Roles: []tufrepo.ReleaseRole{r}, Targets: []tufrepo.Target{target(1)}}, keys, start)
	w.check(err)
	w.people["root"], w.people["targets"], w.people[role] = keys.Root.Signers, keys.Targets.Signers, keys.Release.Signers
	for _, pattern := range []string{"root-*", "targets-*", "release-*"} { // each takes their own away
		files, err := filepath.Glob(filepath.Join(d.Keys(), pattern))
		w.check(err)
		for _, f := range files {
			w.check(os.Remove(f))
		}
	}
	w.sync()
	w.accepts(start, 1)
	return w
}

func (w *drill) check(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func target(n byte) tufrepo.Target {
	return tufrepo.Target{Path: folder + "klatch_" + string('0'+n) + ".lpb", Content: bytes.Repeat([]byte{n}, 100)}
}

// sync is an honest mirror: it copies what is published.
func (w *drill) sync() {
	w.Helper()
	w.check(os.RemoveAll(w.mirror))
	w.check(os.CopyFS(w.mirror, os.DirFS(w.d.Repository())))
}

func (w *drill) look(now time.Time) (*tufclient.Snapshot, error) {
	w.Helper()
	return w.lookWith(w.d, now)
}

func (w *drill) lookWith(d datadir.Dir, now time.Time) (*tufclient.Snapshot, error) {
	w.Helper()
	raw, err := os.ReadFile(d.Anchor())
	w.check(err)
	anchor, err := trust.ParseAnchor(raw, false)
	w.check(err)
	base, client, err := tufclient.Source(w.mirror, nil)
	w.check(err)
	return tufclient.Refresh(w.Context(), tufclient.Config{Root: anchor.Root, Dir: w.memory, BaseURL: base, Client: client, Now: now})
}

// accepts: the machine sees so many livepatches.
func (w *drill) accepts(now time.Time, livepatches int) *tufclient.Snapshot {
	w.Helper()
	s, err := w.look(now)
	if err != nil {
		w.Fatal(err)
	}
	n := 0
	for _, t := range s.Targets() {
		if strings.HasSuffix(t.Path, ".lpb") {
			n++
		}
	}
	if n != livepatches {
		w.Errorf("the machine sees %d livepatches, want %d", n, livepatches)
	}
	return s
}

func (w *drill) refuses(now time.Time, code fault.Code) {
	w.Helper()
	if _, err := w.look(now); fault.CodeOf(err) != code {
		w.Errorf("the machine says %v, want code %s", err, code)
	}
}

// fresh makes keys for people.
func fresh(t *testing.T, n int) (out []crypto.Signer) {
	t.Helper()
	for range n {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, k)
	}
	return out
}

func ids(t *testing.T, signers ...crypto.Signer) (out []string) {
	t.Helper()
	for _, s := range signers {
		id, err := tufrepo.KeyID(s.Public())
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, id)
	}
	return out
}

func publics(signers ...crypto.Signer) (out []crypto.PublicKey) {
	for _, s := range signers {
		out = append(out, s.Public())
	}
	return out
}

// ceremony prepares a change on the publisher's host, carries the file to
// people who each sign a copy, rehearses and completes it.
func (w *drill) ceremony(now time.Time, c tufrepo.Change, people ...crypto.Signer) {
	w.Helper()
	keys, err := ceremony.Keys(w.d)
	w.check(err)
	draft, err := ceremony.Begin(w.Context(), w.d, c, keys, now)
	w.check(err)
	w.sign(now, draft, people...)
}

func (w *drill) sign(now time.Time, draft *tufrepo.Draft, people ...crypto.Signer) {
	w.Helper()
	path, err := ceremony.Save(w.d, draft)
	w.check(err)
	for _, p := range people {
		carried, err := ceremony.Read(path)
		w.check(err)
		_, err = carried.Sign(p)
		w.check(err)
		w.check(draft.Merge(carried))
	}
	keys, err := ceremony.Keys(w.d)
	w.check(err)
	verdicts, err := ceremony.Rehearse(w.Context(), w.d, draft, keys, now)
	w.check(err)
	for _, v := range verdicts {
		if v.Error != "" {
			w.Errorf("rehearsal: %s: %s", v.Client, v.Error)
		}
	}
	_, err = ceremony.Complete(w.Context(), w.d, draft, keys, now)
	w.check(err)
	if left, err := ceremony.Pending(w.d); err != nil || len(left) != 0 {
		w.Errorf("pending %q, %v", left, err)
	}
	w.sync()
}

// release publishes a livepatch, with the signatures of people.
func (w *drill) release(now time.Time, n byte, people ...crypto.Signer) error {
	w.Helper()
	keys, err := sign.RepositoryKeys(w.d, sign.All)
	w.check(err)
	res, err := tufrepo.Publish(w.Context(), w.d.Repository(), tufrepo.Publication{Targets: []tufrepo.Target{target(n)}}, keys, now)
	if res.Draft == nil {
		w.check(err)
		return nil
	}
	for _, p := range people {
		_, err := res.Draft.Sign(p)
		w.check(err)
	}
	_, err = ceremony.Complete(w.Context(), w.d, res.Draft, keys, now)
	w.sync()
	return err
}

// forge lets the thief change a list on the mirror and lead to it, with the
// online keys of the publisher, which they have too.
func (w *drill) forge(list string, from, to int64, thief []crypto.Signer, change func(*metadata.TargetsType)) {
	w.Helper()
	online, err := sign.RepositoryKeys(w.d, sign.Unattended)
	w.check(err)
	r := tufsim.At(w.T, w.mirror)
	name := func(v int64, l string) string { return fmt.Sprintf("metadata/%d.%s.json", v, l) }
	tufsim.Forge(r, name(from, list), name(to, list), thief, func(m *metadata.TargetsType) {
		m.Version = to
		change(m)
	})
	state, err := tufrepo.Look(w.d.Repository())
	w.check(err)
	snapshot := state.Role("snapshot").Version
	tufsim.Forge(r, name(snapshot, "snapshot"), name(snapshot+100, "snapshot"), online.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version, m.Meta[list+".json"] = snapshot+100, metadata.MetaFile(to)
	})
	tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", online.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version += 100
		m.Meta["snapshot.json"] = metadata.MetaFile(snapshot + 100)
	})
}

func steal(m *metadata.TargetsType) {
	evil := metadata.TargetFile()
	evil.Length, evil.Hashes = 1, metadata.Hashes{"sha256": make([]byte, 32)}
	m.Targets[folder+"klatch_9.lpb"] = evil
}

func TestAttack(t *testing.T) {
	now := start.Add(time.Hour)
	for _, tt := range []struct {
		name string
		run  func(w *drill)
	}{
		{"planned root rotation: two of five holders change", func(w *drill) {
			next := fresh(w.T, 2)
			old := w.people["root"]
			w.ceremony(now, tufrepo.Change{Reason: "yearly", Add: map[string][]crypto.PublicKey{"root": publics(next...)},
				Remove: map[string][]string{"root": ids(w.T, old[0], old[1])}}, old[1], old[2], old[3], next[0])
			if s := w.accepts(now, 1); s.Root != 2 {
				w.Errorf("root %d", s.Root)
			}
			w.ceremony(now, tufrepo.Change{Renew: []string{"root"}}, next[0], next[1], old[4])
			if s := w.accepts(now, 1); s.Root != 3 {
				w.Errorf("root %d", s.Root)
			}
		}},
		{"one release key stolen", func(w *drill) {
			thief := w.people[role][0]
			w.forge(role, 1, 9, []crypto.Signer{thief}, steal)
			w.refuses(now, "metadata_untrusted")
			w.sync()
			next := fresh(w.T, 1)[0]
			w.ceremony(now, tufrepo.Change{Reason: "token lost", Add: map[string][]crypto.PublicKey{role: {next.Public()}},
				Remove: map[string][]string{role: ids(w.T, thief)}}, w.people["targets"][0], w.people["targets"][1], w.people[role][1], next)
			// The thief has seen the online keys too: snapshots that were raised must go.
			w.replaceOnline(now)
			w.accepts(now, 1)
			if err := w.release(now, 2, thief, w.people[role][1]); err == nil {
				w.Error("the stolen key still signs")
			}
			w.check(w.release(now, 2, next, w.people[role][1]))
			w.accepts(now, 2)
		}},
		{"threshold of release keys stolen", func(w *drill) {
			thief := w.people[role][:2]
			w.forge(role, 1, 9, thief, steal)
			w.accepts(now, 2) // the manifest signature is what still refuses it
			w.sync()
			next := fresh(w.T, 3)
			w.ceremony(now, tufrepo.Change{Reason: "release keys stolen", Add: map[string][]crypto.PublicKey{role: publics(next...)},
				Remove: map[string][]string{role: ids(w.T, w.people[role]...)}}, w.people["targets"][0], w.people["targets"][2], next[0], next[1])
			w.replaceOnline(now)
			w.accepts(now, 1)
			w.forge(role, 2, 99, thief, steal)
			w.refuses(now, "metadata_untrusted")
		}},
		{"targets threshold stolen", func(w *drill) {
			thief := w.people["targets"][:2]
			w.forge("targets", 1, 9, thief, func(m *metadata.TargetsType) { steal(m) })
			w.accepts(now, 2)
			w.sync()
			next, old := fresh(w.T, 3), w.people["targets"]
			w.ceremony(now, tufrepo.Change{Reason: "targets keys stolen", Add: map[string][]crypto.PublicKey{"targets": publics(next...)},
				Remove: map[string][]string{"targets": ids(w.T, old...)}}, append(w.people["root"][:3:3], next[:2]...)...)
			w.replaceOnline(now)
			w.accepts(now, 1)
			w.forge("targets", 2, 99, thief, steal)
			w.refuses(now, "metadata_untrusted")
		}},
		{"snapshot and timestamp keys stolen, versions raised", func(w *drill) {
			w.forge(role, 1, 1, w.people[role][:2], func(*metadata.TargetsType) {})
			w.accepts(now, 1) // nothing new, but versions that the publisher will not reach
			w.sync()
			w.refuses(now, "metadata_rollback")
			w.replaceOnline(now)
			w.accepts(now, 1)
		}},
		{"timestamp raised to the highest number", func(w *drill) {
			online, err := sign.RepositoryKeys(w.d, sign.Unattended)
			w.check(err)
			tufsim.Forge(tufsim.At(w.T, w.mirror), "metadata/timestamp.json", "metadata/timestamp.json", online.Timestamp.Signers,
				func(m *metadata.TimestampType) { m.Version = math.MaxInt64 })
			w.refuses(now, "metadata_jump")
			w.sync()
			w.accepts(now, 1)
		}},
		{"root threshold stolen: a new anchor by another way", func(w *drill) {
			thief := w.people["root"][:3]
			evil := fresh(w.T, 3)
			tufsim.Forge(tufsim.At(w.T, w.mirror), "metadata/1.root.json", "metadata/2.root.json", thief, func(m *metadata.RootType) {
				m.Version = 2
				k, err := metadata.KeyFromPublicKey(evil[0].Public())
				w.check(err)
				m.Roles["timestamp"].KeyIDs = nil
				w.check(m.AddKey(k, "timestamp"))
			})
			w.refuses(now, "metadata_untrusted") // the thief's root is in force: the publisher's timestamp counts no more
			w.sync()
			w.refuses(now, "metadata_untrusted") // it cannot be healed in band
			d, err := datadir.Make(w.TempDir(), datadir.Policy{Publisher: "example.org", Profile: trust.Full})
			w.check(err)
			w.check(sign.MakeKeys(w.Context(), d, now))
			keys, err := ceremony.Keys(d)
			w.check(err)
			_, err = tufrepo.Publish(w.Context(), d.Repository(), tufrepo.Publication{Targets: []tufrepo.Target{target(1)}}, keys, now)
			w.check(err)
			w.mirror = d.Repository()
			if _, err := w.lookWith(d, now); err != nil {
				w.Errorf("with the new anchor: %v", err)
			}
		}},
		{"one root key lost, and one holder gone", func(w *drill) {
			old, next := w.people["root"], fresh(w.T, 2)
			w.ceremony(now, tufrepo.Change{Reason: "Anna left, Bert lost his token", Add: map[string][]crypto.PublicKey{"root": publics(next...)},
				Remove: map[string][]string{"root": ids(w.T, old[0], old[1])}}, old[2], old[3], old[4])
			w.accepts(now, 1)
		}},
		{"expiry lapses: the root", func(w *drill) {
			late := start.Add(tufrepo.RootLife + 24*time.Hour)
			w.refuses(late, "metadata_expired")
			state, err := tufrepo.Look(w.d.Repository())
			w.check(err)
			for _, e := range ceremony.Calendar(state, late) {
				if e.What == "root" && e.Level != ceremony.Expired {
					w.Errorf("calendar %+v", e)
				}
			}
			all := append(append(w.people["root"][:3:3], w.people["targets"][:2]...), w.people[role][:2]...)
			w.ceremony(late, tufrepo.Change{Renew: []string{"root", "targets", role}}, all...)
			w.accepts(late, 1)
		}},
		{"bad but honest livepatch", func(w *drill) {
			w.check(w.release(now, 2, w.people[role][:2]...))
			w.accepts(now, 2)
			kernel := [20]byte{7}
			_, res, err := publish.Recall(w.Context(), w.d, func(r *livepatch.Recalls) {
				r.Entries = append(r.Entries, livepatch.Recall{Kernel: kernel, Sequence: 2, Reason: "it eats files"})
			}, now)
			if res.Draft == nil {
				w.Fatalf("one host alone recalled: %v", err)
			}
			w.sign(now, res.Draft, w.people["targets"][:2]...)
			s := w.accepts(now, 2)
			t, err := s.Target(livepatch.RecallsPath(1))
			if err != nil || t.Role != "targets" {
				w.Errorf("recalls %+v, %v", t, err)
			}
		}},
		{"a ceremony that too few sign", func(w *drill) {
			keys, err := ceremony.Keys(w.d)
			w.check(err)
			draft, err := ceremony.Begin(w.Context(), w.d, tufrepo.Change{Renew: []string{"root"}}, keys, now)
			w.check(err)
			_, err = draft.Sign(w.people["root"][0], w.people["root"][1], w.people["targets"][0])
			w.check(err)
			if _, err := ceremony.Rehearse(w.Context(), w.d, draft, keys, now); fault.CodeOf(err) != "keys_not_in_root" {
				w.Errorf("rehearsal: %v", err)
			}
			if _, err := ceremony.Complete(w.Context(), w.d, draft, keys, now); fault.CodeOf(err) != "keys_not_in_root" {
				w.Errorf("completion: %v", err)
			}
			w.sync()
			if s := w.accepts(now, 1); s.Root != 1 {
				w.Errorf("root %d", s.Root)
			}
		}},
	} {
		t.Run("C/"+tt.name, func(t *testing.T) {
			tt.run(newDrill(t))
		})
	}
}

// replaceOnline is the answer to every theft of the online keys: new ones, in a
// new root. The old files are gone, so that nothing is signed with them.
func (w *drill) replaceOnline(now time.Time) {
	w.Helper()
	state, err := tufrepo.Look(w.d.Repository())
	w.check(err)
	c := tufrepo.Change{Reason: "online keys", Add: map[string][]crypto.PublicKey{}, Remove: map[string][]string{}}
	for _, online := range []string{"snapshot", "timestamp"} {
		old, err := sign.KeyFiles(w.d, online)
		w.check(err)
		path, err := sign.NewKeyFile(w.d, online)
		w.check(err)
		for _, f := range old {
			w.check(os.Remove(f))
		}
		pub, err := keyfile.Public(path)
		w.check(err)
		c.Add[online] = []crypto.PublicKey{pub}
		for _, k := range state.Role(online).Keys {
			c.Remove[online] = append(c.Remove[online], k.ID)
		}
	}
	w.ceremony(now, c, w.people["root"][:3]...)
}
