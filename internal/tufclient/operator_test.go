// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/testkit/opsim"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/testkit/tufsim"
	. "klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

var (
	opStart  = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	opKernel = pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	opDigest = strings.Repeat("ab", 32)
	opPath   = rollout.PromotionPath("stable", opDigest)
)

// opMachine is a machine of tier stable that looks at the operator's repository.
type opMachine struct {
	t    *testing.T
	root []byte
	dir  string
	url  string
}

func (m opMachine) look(now time.Time, paths ...string) error {
	s, err := Refresh(m.t.Context(), Config{Root: m.root, Dir: m.dir, BaseURL: m.url, Now: now, Lazy: true, Operator: &Operator{Approvers: 2}})
	if err != nil {
		return err
	}
	for _, p := range paths {
		f, err := s.Target(p)
		if err != nil {
			return err
		}
		if _, err := s.Download(m.t.Context(), f, 1<<16); err != nil {
			return err
		}
		want, _, _ := strings.Cut(p, "/")
		if want == "policy" {
			want = "targets"
		}
		if f.Role != want {
			m.t.Errorf("%s is signed by role %s", p, f.Role)
		}
	}
	return nil
}

func newOperator(t *testing.T) (*opsim.Operator, opMachine) {
	o := opsim.New(t, "ops", opStart, rollout.Tier{Name: "canary"}, rollout.Tier{Name: "stable", SoakHours: 24})
	o.Choose(opStart, rollout.Selection{Tier: "stable", Kernel: opKernel, Sequence: 1, Bytes: 1, SHA256: opDigest,
		Target: "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb", Since: opStart})
	return o, opMachine{t, o.Root, t.TempDir(), o.Serve()}
}

func opPromotion(tier string) rollout.Promotion {
	return rollout.Promotion{Tier: tier, SHA256: opDigest, Target: "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb", Since: opStart, PromotedAt: opStart, Reason: "well"}
}

func TestOperatorsTreeIsFollowed(t *testing.T) {
	o, m := newOperator(t)
	o.Promote(opStart, opPromotion("stable"))
	for range 2 { // from the network, then from the memory
		if err := m.look(opStart, rollout.TiersPath, rollout.SelectPath("stable", opKernel.ID), opPath); err != nil {
			t.Error(err)
		}
	}
	if err := m.look(opStart, rollout.SelectPath("canary", opKernel.ID)); fault.KindOf(err) != fault.NotFound {
		t.Errorf("what is not there: %v", err)
	}
	full, err := Refresh(t.Context(), Config{Root: o.Root, Dir: t.TempDir(), BaseURL: m.url, Now: opStart, Operator: &Operator{Approvers: 2}})
	if err != nil || len(full.Targets()) != 3 || full.Files()[len(full.Files())-1].Name != "timestamp.json" {
		t.Errorf("a mirror sees %+v, %v", full, err)
	}
}

// forgeList signs a list with what a thief has of its role's keys, and leads
// the snapshot and the timestamp to it: the server's keys are the thief's.
func forgeList(o *opsim.Operator, role string, by []string, change func(*metadata.TargetsType)) {
	names, err := filepath.Glob(filepath.Join(o.Dir, "metadata", "*."+role+".json"))
	if err != nil || len(names) == 0 {
		panic(err)
	}
	newest := names[len(names)-1]
	all := map[string][]int{"select": {0}, "promotion": {1, 2}}
	var keys = o.Keys.Release.Signers[:0:0]
	for _, b := range by {
		switch b {
		case "targets":
			keys = append(keys, o.Keys.Targets.Signers...)
		case "snapshot":
			keys = append(keys, o.Keys.Snapshot.Signers...)
		case "timestamp":
			keys = append(keys, o.Keys.Timestamp.Signers...)
		case "one promotion":
			keys = append(keys, o.Keys.Release.Signers[1])
		default:
			for _, i := range all[b] {
				keys = append(keys, o.Keys.Release.Signers[i])
			}
		}
	}
	tufsim.Forge(o.Repo, "metadata/"+filepath.Base(newest), "metadata/90."+role+".json", keys, func(m *metadata.TargetsType) {
		m.Version = 90
		change(m)
	})
	snapshots, err := filepath.Glob(filepath.Join(o.Dir, "metadata", "*.snapshot.json"))
	if err != nil || len(snapshots) == 0 {
		panic(err)
	}
	tufsim.Forge(o.Repo, "metadata/"+filepath.Base(snapshots[len(snapshots)-1]), "metadata/90.snapshot.json", o.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 90
		m.Meta[role+".json"] = metadata.MetaFile(90)
	})
	tufsim.Forge(o.Repo, "metadata/timestamp.json", "metadata/timestamp.json", o.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version = 90
		m.Meta["snapshot.json"] = metadata.MetaFile(90)
	})
}

// TestAttackR: the server is owned: its three keys and all of its files are a
// thief's, and in some cases one person's key too. What the thief would like
// must not even be read.
func TestAttackR(t *testing.T) {
	server := []string{"select", "snapshot", "timestamp"}
	top := func(by []string, change func(*metadata.TargetsType)) func(*opsim.Operator) {
		return func(o *opsim.Operator) { forgeList(o, "targets", by, change) }
	}
	role := func(name string, change func(*metadata.DelegatedRole)) func(*opsim.Operator) {
		return top([]string{"targets"}, func(m *metadata.TargetsType) {
			for i := range m.Delegations.Roles {
				if m.Delegations.Roles[i].Name == name {
					change(&m.Delegations.Roles[i])
				}
			}
		})
	}
	promotion := func(o *opsim.Operator) *metadata.TargetFiles {
		// The file itself anybody can put there.
		p := opPromotion("stable")
		p.Format = rollout.PromotionFormat
		b, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		f, err := metadata.TargetFile().FromBytes(opPath, b, "sha256")
		if err != nil {
			t.Fatal(err)
		}
		o.Write("targets/promotion/stable/"+f.Hashes["sha256"].String()+"."+opDigest+".json", b)
		return f
	}
	for _, tt := range []struct {
		name   string
		attack func(o *opsim.Operator)
		want   fault.Code
	}{
		{"server key tries to replace the promotion keys", top(server, func(m *metadata.TargetsType) {
			for i := range m.Delegations.Roles {
				m.Delegations.Roles[i].KeyIDs = m.Delegations.Roles[0].KeyIDs
			}
		}), "metadata_untrusted"},
		{"server key tries to sign other tiers", top(server, func(m *metadata.TargetsType) {}), "metadata_untrusted"},
		{"server keys sign a promotion", func(o *opsim.Operator) {
			forgeList(o, "promotion", server, func(m *metadata.TargetsType) { m.Targets[opPath] = promotion(o) })
		}, "metadata_untrusted"},
		{"promotion 1-of-2", func(o *opsim.Operator) {
			forgeList(o, "promotion", []string{"one promotion"}, func(m *metadata.TargetsType) { m.Targets[opPath] = promotion(o) })
		}, "metadata_untrusted"},
		{"promotion by one person and the server", func(o *opsim.Operator) {
			forgeList(o, "promotion", append(server, "one promotion"), func(m *metadata.TargetsType) { m.Targets[opPath] = promotion(o) })
		}, "metadata_untrusted"},
		{"one approver under two ids", func(o *opsim.Operator) {
			twin := strings.Repeat("ab", 32)
			forgeList(o, "targets", []string{"targets"}, func(m *metadata.TargetsType) {
				for i := range m.Delegations.Roles {
					if r := &m.Delegations.Roles[i]; r.Name == "promotion" {
						k := *m.Delegations.Keys[r.KeyIDs[0]]
						k.UnrecognizedFields = map[string]any{"x": "y"}
						m.Delegations.Keys[twin] = &k
						r.KeyIDs = []string{r.KeyIDs[0], twin}
					}
				}
			})
			forgeList(o, "promotion", []string{"one promotion"}, func(m *metadata.TargetsType) { m.Targets[opPath] = promotion(o) })
			var m map[string]any
			if err := json.Unmarshal(o.Read("metadata/90.promotion.json"), &m); err != nil {
				t.Fatal(err)
			}
			first := m["signatures"].([]any)[0].(map[string]any)
			m["signatures"] = []any{first, map[string]any{"keyid": twin, "sig": first["sig"]}}
			b, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			o.Write("metadata/90.promotion.json", b)
		}, "metadata_untrusted"},
		{"select lists a promotion", func(o *opsim.Operator) {
			forgeList(o, "select", []string{"select"}, func(m *metadata.TargetsType) { m.Targets[opPath] = promotion(o) })
		}, "target_missing"},
		{"select delegates promotion", func(o *opsim.Operator) {
			forgeList(o, "select", []string{"select"}, func(m *metadata.TargetsType) {
				m.Targets[opPath] = promotion(o)
				m.Delegations = &metadata.Delegations{Keys: map[string]*metadata.Key{}, Roles: []metadata.DelegatedRole{}}
			})
		}, "delegation_refused"},
		{"one person promotes", role("promotion", func(d *metadata.DelegatedRole) { d.Threshold = 1 }), "delegation_refused"},
		{"promotion for any path", role("promotion", func(d *metadata.DelegatedRole) { d.Paths = []string{"*/*/*"} }), "delegation_refused"},
		{"select for promotions", role("select", func(d *metadata.DelegatedRole) { d.Paths = []string{"select/*/*", "promotion/*/*"} }), "delegation_refused"},
		{"select that does not terminate", role("select", func(d *metadata.DelegatedRole) { d.Terminating = false }), "delegation_refused"},
		{"select twice", role("promotion", func(d *metadata.DelegatedRole) { d.Name, d.Paths = "select", []string{"select/*/*"} }), "delegation_refused"},
		{"another role in promotion's place", role("promotion", func(d *metadata.DelegatedRole) { d.Name, d.Paths = "extra", []string{"extra/*/*"} }), "delegation_refused"},
		{"a third role", top([]string{"targets"}, func(m *metadata.TargetsType) {
			d := m.Delegations.Roles[0]
			d.Name, d.Paths = "extra", []string{"extra/*/*"}
			m.Delegations.Roles = append(m.Delegations.Roles, d)
		}), "delegation_refused"},
		{"promotion gone", top([]string{"targets"}, func(m *metadata.TargetsType) {
			m.Delegations.Roles = m.Delegations.Roles[:1]
		}), "delegation_refused"},
		{"no delegation", top([]string{"targets"}, func(m *metadata.TargetsType) { m.Delegations = nil }), "delegation_refused"},
		{"an approver's key on the server", role("promotion", func(d *metadata.DelegatedRole) {
			k := tufsim.Signers("opsselect", 1)[0].Public()
			id, err := tufrepo.KeyID(k)
			if err != nil {
				t.Fatal(err)
			}
			d.KeyIDs = append(d.KeyIDs, id)
		}), "delegation_refused"},
		{"one person signs the top list", func(o *opsim.Operator) {
			tufsim.Forge(o.Repo, "metadata/1.root.json", "metadata/2.root.json", o.Keys.Root.Signers, func(m *metadata.RootType) {
				m.Version = 2
				m.Roles["targets"].Threshold = 1
			})
		}, "delegation_refused"},
		{"expired rollout", func(*opsim.Operator) {}, "metadata_expired"},
	} {
		t.Run("Attack/R/"+tt.name, func(t *testing.T) {
			o, m := newOperator(t)
			if err := m.look(opStart, rollout.TiersPath, rollout.SelectPath("stable", opKernel.ID)); err != nil {
				t.Fatal(err)
			}
			tt.attack(o)
			now := opStart.Add(time.Hour)
			if tt.want == "metadata_expired" {
				now = opStart.Add(25 * time.Hour)
			}
			// One machine has seen the honest state, one is new.
			for _, dir := range []string{m.dir, t.TempDir()} {
				m.dir = dir
				err := m.look(now, rollout.SelectPath("stable", opKernel.ID), opPath)
				if code := fault.CodeOf(err); code != tt.want {
					t.Errorf("code %q, want %q: %v", code, tt.want, err)
				}
			}
		})
	}
	t.Run("Attack/R/server restored from backup", func(t *testing.T) {
		o, m := newOperator(t)
		backup := t.TempDir()
		if err := os.CopyFS(filepath.Join(backup, "r"), os.DirFS(o.Dir)); err != nil {
			t.Fatal(err)
		}
		o.Promote(opStart.Add(time.Hour), opPromotion("stable"))
		if err := m.look(opStart.Add(time.Hour), opPath); err != nil {
			t.Fatal(err)
		}
		m.url = tufsim.At(t, filepath.Join(backup, "r")).Serve()
		if err := m.look(opStart.Add(2*time.Hour), opPath); fault.CodeOf(err) != "metadata_rollback" {
			t.Error(err)
		}
	})
	t.Run("Attack/R/promotions that nobody renewed", func(t *testing.T) {
		o, m := newOperator(t)
		o.Promote(opStart, opPromotion("stable"))
		if err := m.look(opStart, opPath); err != nil {
			t.Fatal(err)
		}
		now := opStart.Add(tufrepo.PromotionLife + time.Hour)
		o.Keys.Release.Signers = o.Select // the approvers are on holiday
		if _, err := tufrepo.Refresh(t.Context(), o.Dir, o.Keys, now); err != nil {
			t.Fatal(err)
		}
		if err := m.look(now, rollout.SelectPath("stable", opKernel.ID)); err != nil {
			t.Errorf("what the server signs goes on: %v", err)
		}
		if err := m.look(now, opPath); fault.CodeOf(err) != "metadata_expired" {
			t.Error(err)
		}
	})
	t.Run("Attack/R/the publisher in the operator's place", func(t *testing.T) {
		p := pubsim.New(t, "acme", opStart)
		p.Release(opStart, opKernel, 1)
		m := opMachine{t, p.Root, t.TempDir(), p.Serve()}
		if err := m.look(opStart, rollout.TiersPath); fault.CodeOf(err) != "delegation_refused" {
			t.Error(err)
		}
		o, _ := newOperator(t)
		if _, err := Refresh(t.Context(), Config{Root: o.Root, Dir: t.TempDir(), BaseURL: o.Serve(), Now: opStart}); fault.CodeOf(err) != "delegation_refused" {
			t.Errorf("the operator in the publisher's place: %v", err)
		}
	})
}
