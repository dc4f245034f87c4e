// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/local"
	"klatch/internal/rollout"
	"klatch/internal/testkit"
	"klatch/internal/testkit/opsim"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufrepo"
)

// operated is a rig whose server hands out both repositories. All files are
// signed by real keys and read by a real klatchd.
type operated struct {
	*rig
	op *opsim.Operator
}

func newOperated(t *testing.T, tier string) *operated {
	t.Helper()
	testkit.Need(t, "root") // to ask for checks
	r := &operated{newRig(t), opsim.New(t, "ops", time.Now(), rollout.Tier{Name: "canary"}, rollout.Tier{Name: "stable", SoakHours: 1})}
	r.fleet.Also("/rollout/", http.StripPrefix("/rollout", r.op.Handler()))
	b, err := r.op.Anchor.Encode()
	if err != nil {
		t.Fatal(err)
	}
	r.machine.Write("etc/klatch/rollout.json", string(b))
	r.machine.Write("etc/klatch/conf.d/60-tier.toml", "tier = \""+tier+"\"\n")
	r.enroll()
	return r
}

// released publishes a livepatch and says how the operator names it.
func (r *operated) released(s livepatch.Sequence, tier string) rollout.Selection {
	r.t.Helper()
	m, bundle := r.fleet.Pub.Livepatch(r.machine.Kernel, s, "CVE-2026-0001")
	r.fleet.Repo.Publish(time.Now(), tufrepo.Target{Path: m.TargetPath(), Content: bundle})
	r.fleet.OfferTarget(m.TargetPath(), s)
	sum := sha256.Sum256(bundle)
	return rollout.Selection{Tier: tier, Kernel: r.machine.Kernel, Sequence: s, Target: m.TargetPath(), Bytes: int64(len(bundle)),
		SHA256: hex.EncodeToString(sum[:]), Since: time.Now().UTC().Truncate(time.Second)}
}

func promotion(s rollout.Selection) rollout.Promotion {
	at := time.Now().UTC().Truncate(time.Second)
	return rollout.Promotion{Tier: s.Tier, Target: s.Target, SHA256: s.SHA256, Since: at.Add(-2 * time.Hour), PromotedAt: at, Reason: "well"}
}

func (r *operated) look() agent.Status {
	r.t.Helper()
	r.until("up", func(agent.Status) bool { return true })
	if _, err := local.Dial(r.socket).Check(r.t.Context()); err != nil && fault.KindOf(err) != fault.Conflict {
		r.t.Fatal(err)
	}
	return r.until("looked", func(s agent.Status) bool { return s.Check.Result != "" })
}

// forge signs promotion or select with some of the keys, and leads the server's
// own metadata to it.
func (r *operated) forge(role string, by int, change func(*metadata.TargetsType)) {
	r.t.Helper()
	newest := func(name string) string {
		found, err := filepath.Glob(filepath.Join(r.op.Dir, "metadata", "*."+name+".json"))
		if err != nil || len(found) == 0 {
			r.t.Fatalf("no %s: %v", name, err)
		}
		return "metadata/" + filepath.Base(found[len(found)-1])
	}
	keys := r.op.Promotion[:by]
	if role == rollout.RoleSelect {
		keys = r.op.Select
	}
	tufsim.Forge(r.op.Repo, newest(role), "metadata/90."+role+".json", keys, func(m *metadata.TargetsType) { m.Version = 90; change(m) })
	tufsim.Forge(r.op.Repo, newest("snapshot"), "metadata/90.snapshot.json", r.op.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 90
		m.Meta[role+".json"] = &metadata.MetaFiles{Version: 90}
	})
	tufsim.Forge(r.op.Repo, "metadata/timestamp.json", "metadata/timestamp.json", r.op.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version = 90
		m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 90}
	})
}

// TestAttackRolloutOnTheDaemon: the server is the attacker's, with its keys for
// select, snapshot and timestamp. It offers livepatch 2, and nothing loads it.
func TestAttackRolloutOnTheDaemon(t *testing.T) {
	for _, tt := range []struct {
		name, tier string
		code       fault.Code
		evil       func(r *operated, s rollout.Selection)
	}{
		{"target absent in patches", "canary", "target_not_released", func(r *operated, s rollout.Selection) {
			s.Sequence, s.Target = 3, filepath.Dir(s.Target)+"/klatch_3.lpb"
			r.op.Choose(time.Now(), s)
		}},
		{"digest differs", "canary", "repositories_disagree", func(r *operated, s rollout.Selection) {
			s.SHA256 = s.SHA256[1:] + "0"
			r.op.Choose(time.Now(), s)
		}},
		{"ring without promotion", "stable", rollout.CodeNotPromoted, func(r *operated, s rollout.Selection) { r.op.Choose(time.Now(), s) }},
		{"promotion 1-of-2", "stable", "metadata_untrusted", func(r *operated, s rollout.Selection) {
			r.op.Choose(time.Now(), s)
			r.op.Promote(time.Now(), promotion(s))
			r.forge(rollout.RolePromotion, 1, func(*metadata.TargetsType) {})
		}},
		{"server key signs a promotion", "stable", rollout.CodeNotPromoted, func(r *operated, s rollout.Selection) {
			r.op.Choose(time.Now(), s)
			p := promotion(s)
			p.Format = rollout.PromotionFormat
			b, err := p.Encode()
			if err != nil {
				r.t.Fatal(err)
			}
			path := rollout.PromotionPath(s.Tier, s.SHA256)
			sum := sha256.Sum256(b)
			r.op.Write("targets/"+filepath.Dir(path)+"/"+hex.EncodeToString(sum[:])+"."+filepath.Base(path), b)
			r.forge(rollout.RoleSelect, 0, func(m *metadata.TargetsType) {
				m.Targets[path] = &metadata.TargetFiles{Length: int64(len(b)), Hashes: metadata.Hashes{"sha256": sum[:]}}
			})
		}},
		{"soak not elapsed", "stable", rollout.CodeSoaking, func(r *operated, s rollout.Selection) {
			r.op.Choose(time.Now(), s)
			p := promotion(s)
			p.Since = p.PromotedAt
			r.op.Promote(time.Now(), p)
		}},
		{"server restored from backup", "canary", "metadata_rollback", func(r *operated, s rollout.Selection) {
			before := r.op.Read("metadata/timestamp.json")
			r.op.Choose(time.Now(), s)
			r.op.Choose(time.Now(), func() rollout.Selection { s.Hold, s.Reason = true, "a bad one"; return s }())
			r.look()
			r.op.Write("metadata/timestamp.json", before)
		}},
		{"rollout taken away", "canary", "metadata_unavailable", func(r *operated, s rollout.Selection) {
			r.op.Choose(time.Now(), s)
			r.op.Lie("/metadata/timestamp.json", http.NotFound)
		}},
	} {
		t.Run("Attack/R/"+tt.name, func(t *testing.T) {
			t.Parallel()
			r := newOperated(t, tt.tier)
			first := r.released(1, tt.tier)
			r.op.Choose(time.Now(), first)
			r.op.Promote(time.Now(), promotion(first))
			r.start()
			r.look()
			r.until("confirmed", confirmed)
			tt.evil(r, r.released(2, tt.tier))
			r.look()
			s := r.until(string(tt.code), func(s agent.Status) bool { return s.Check.Code == tt.code })
			if r.machine.Loads() != 1 || s.State.Sequence != 1 || s.Rollout == nil || s.Rollout.Tier != tt.tier {
				t.Errorf("%d loads, state %+v, rollout %+v", r.machine.Loads(), s.State, s.Rollout)
			}
			if left, err := filepath.Glob(filepath.Join(r.state, "staged", "klatch_2*")); err != nil || len(left) > 0 {
				t.Errorf("staged: %v, %v", left, err)
			}
		})
	}
}

// TestRolloutFromEndToEnd: selected and promoted, it loads.
func TestRolloutFromEndToEnd(t *testing.T) {
	r := newOperated(t, "stable")
	s := r.released(1, "stable")
	r.op.Choose(time.Now(), s)
	r.start()
	if st := r.look(); st.Check.Code != rollout.CodeNotPromoted || r.machine.Loads() != 0 {
		t.Errorf("before the promotion: %+v", st.Check)
	}
	r.op.Promote(time.Now(), promotion(s))
	r.look()
	st := r.until("confirmed", confirmed)
	if st.State.Seen == nil || st.State.Seen.Rollout == nil || st.State.Seen.Rollout.Root != 1 || st.Floor == nil {
		t.Errorf("seen %+v, floor %+v", st.State.Seen, st.Floor)
	}
	for _, dir := range []string{"metadata", "rollout"} { // two memories
		if _, err := durable.ReadFile(filepath.Join(r.state, dir, "timestamp.json"), 1<<20); err != nil {
			t.Error(err)
		}
	}
}
