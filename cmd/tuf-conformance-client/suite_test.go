// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// firstLook is what a client asks that has seen the first root only.
var firstLook = []string{"root 2", "timestamp", "snapshot 1", "targets 1"}

// days from now, as metadata has it.
func days(n int) time.Time { return time.Now().UTC().Truncate(time.Second).AddDate(0, 0, n) }

func basicCases() []simCase {
	cases := []simCase{
		{"basic/basic_refresh_requests", func(s *sim) {
			s.begin()
			s.requests()
			s.refresh(true)
			s.requests(firstLook...)
		}},
		{"basic/basic_refresh_trusted_data", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.holds(1, 1, 1, 1, 0)
			s.same("root", "timestamp", "snapshot", "targets")
		}},
		{"basic/implicit_refresh", func(s *sim) {
			s.begin()
			s.download(false, "nonexistent artifact")
			s.requests(firstLook...)
			s.same("root", "timestamp", "snapshot", "targets")
		}},
		{"basic/invalid_initial_root", func(s *sim) {
			var m, signed map[string]json.RawMessage
			s.check(json.Unmarshal(s.last("root"), &m))
			s.check(json.Unmarshal(m["signed"], &signed))
			delete(signed, "version")
			var err error
			m["signed"], err = json.Marshal(signed)
			s.check(err)
			b, err := json.Marshal(m)
			s.check(err)
			s.init(b) // says nothing of what is in it
			s.refresh(false)
			s.requests()
		}},
		{"basic/unsigned_initial_root", func(s *sim) {
			good := s.last("root")
			s.signatures("root", func(all []metadata.Signature) []metadata.Signature {
				all[0].Signature = append(metadata.HexBytes{all[0].Signature[0] ^ 1}, all[0].Signature[1:]...)
				return all
			})
			s.init(s.last("root"))
			s.refresh(false)
			s.requests()
			s.init(good)
			s.refresh(true)
		}},
		{"basic/timestamp_content_changes", func(s *sim) {
			s.begin()
			s.refresh(true)
			was := s.last("timestamp")
			s.withdraw("timestamp", 1)
			s.timestamp.Signed.Version, s.timestamp.Signed.Meta["snapshot.json"].Version = 0, 100
			s.publish("timestamp")
			s.refresh(true)
			s.lastAsked("timestamp")
			s.replace("timestamp", was)
			s.same("timestamp")
		}},
		{"basic/basic_metadata_hash_support", func(s *sim) {
			s.hashes = true
			s.all()
			s.begin()
			s.refresh(true)
			s.publish("targets")
			s.snapshot.Signed.Meta["targets.json"].Hashes["sha256"] = make([]byte, 32)
			s.publish("snapshot", "timestamp")
			s.refresh(false)
			s.holds(1, 3, 3, 2, 0)
		}},
		{"basic/metadata_bytes_match", func(s *sim) {
			s.begin()
			s.replace("timestamp", append(s.last("timestamp"), ' '))
			s.refresh(true)
			s.same("timestamp")
		}},
		{"basic/custom_fields", func(s *sim) {
			s.begin()
			s.refresh(true)
			k := s.public(s.key())
			k.UnrecognizedFields = map[string]any{"extra-field": map[string]any{"a": 1, "b": 2}}
			s.check(s.root.Signed.AddKey(k, "root"))
			s.root.Signed.Roles["root"].UnrecognizedFields = map[string]any{"another-field": "value"}
			s.root.Signed.UnrecognizedFields = map[string]any{"custom-field": "value"}
			s.publish("root")
			for _, name := range []string{"extra-field", "another-field", "custom-field"} {
				if !strings.Contains(string(s.last("root")), name) {
					s.t.Errorf("the root has no %s", name)
				}
			}
			s.refresh(true)
			s.same("root")
			// They are part of what is signed.
			s.publish("root")
			s.replace("root", []byte(strings.Replace(string(s.last("root")), `"another-field":"value"`, `"another-field":"other"`, 1)))
			s.refresh(false)
			s.trusts("root", 2)
		}},
		{"basic/deprecated_keyid_hash_algorithms", func(s *sim) {
			s.begin()
			s.root.Signed.Roles["snapshot"].KeyIDs, s.signers["snapshot"] = nil, nil
			s.addAltered("snapshot", s.key(), func(k *metadata.Key) {
				k.UnrecognizedFields = map[string]any{"keyid_hash_algorithms": "md5"}
			})
			s.publish("root", "snapshot")
			s.publish("timestamp")
			s.refresh(true)
			s.holds(2, 2, 2, 1, 0)
		}},
		{"basic/snapshot_404", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.timestamp.Signed.Meta["snapshot.json"].Version++
			s.publish("timestamp")
			s.refresh(false)
			s.lastAsked("snapshot 2")
			s.holds(1, 2, 1, 1, 0)
		}},
		{"basic/targets_404", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.snapshot.Signed.Meta["targets.json"].Version++
			s.publish("snapshot", "timestamp")
			s.refresh(false)
			s.lastAsked("targets 2")
			s.holds(1, 2, 2, 1, 0)
		}},
		{"basic/timestamp_404", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.withdraw("timestamp", 1)
			s.refresh(false)
			s.lastAsked("timestamp")
		}},
		{"basic/incorrect_metadata_type", func(s *sim) {
			s.begin()
			s.addKey("snapshot", s.signers["timestamp"][0])
			s.publish("root")
			s.snapshot.Signed.Meta = map[string]*metadata.MetaFiles{"snapshot.json": {Version: 1}}
			s.publish("snapshot")
			s.replace("timestamp", s.last("snapshot"))
			s.withdraw("snapshot", 1)
			s.refresh(false)
			s.holds(2, 0, 0, 0, 0)
		}},
		{"basic/faketime", func(s *sim) {
			s.begin()
			s.root.Signed.Expires = days(7)
			s.publish("root")
			s.refresh(true)
			s.later(true, days(6), "refresh")
			s.later(false, days(8), "refresh")
		}},
		{"basic/ours: another specification", func(s *sim) {
			s.begin()
			s.lists["targets"].Signed.SpecVersion = "1.99.0"
			s.all()
			s.refresh(true)
			s.lists["targets"].Signed.SpecVersion = "2.0.0"
			s.all()
			s.refresh(false)
			s.holds(1, 3, 3, 2, 0)
		}},
		{"basic/ours: a version that is a million higher", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.timestamp.Signed.Version = 1_000_000
			s.publish("timestamp")
			s.refresh(true)
			s.timestamp.Signed.Version = 2_000_001
			s.publish("timestamp")
			s.refresh(false)
			s.trusts("timestamp", 1_000_001)
		}},
		{"basic/new_targets_version_mismatch", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.publish("targets")
			s.refresh(true)
			s.lastAsked("timestamp")
			s.holds(1, 1, 1, 1, 0)
		}},
	}
	// What the client holds after one role was refused: those before it.
	upTo := map[string][4]int64{"root": {1}, "timestamp": {2}, "snapshot": {2, 2}, "targets": {2, 2, 2}}
	for _, role := range []string{"root", "timestamp", "snapshot", "targets"} {
		h := upTo[role]
		cases = append(cases, simCase{"basic/unsigned_metadata: " + role, func(s *sim) {
			good := s.signers[role]
			s.begin()
			s.signers[role] = nil
			s.publish("root")
			s.all()
			s.refresh(false)
			s.holds(h[0], h[1], h[2], h[3], 0)
			s.signers[role] = good
			s.withdraw(role, 1)
			s.again(role)
			s.refresh(true)
			s.holds(2, 2, 2, 2, 0)
		}})
		if role == "timestamp" {
			continue // has no version in its address
		}
		cases = append(cases, simCase{"basic/url_and_metadata_version_mismatch: " + role, func(s *sim) {
			s.begin()
			s.bump(role)
			s.publish("root")
			s.all()
			switch role { // what names it says 2, as the address does
			case "snapshot":
				s.timestamp.Signed.Meta["snapshot.json"].Version = 2
				s.withdraw("timestamp", 1)
				s.timestamp.Signed.Version--
				s.publish("timestamp")
			case "targets":
				s.snapshot.Signed.Meta["targets.json"].Version = 2
				s.withdraw("snapshot", 1)
				s.withdraw("timestamp", 1)
				s.snapshot.Signed.Version--
				s.timestamp.Signed.Version--
				s.publish("snapshot", "timestamp")
			}
			s.refresh(false)
			s.lastAsked(role + " 2")
			s.holds(h[0], h[1], h[2], h[3], 0)
		}})
	}
	return cases
}

// bump skips a version of a role.
func (s *sim) bump(role string) {
	switch role {
	case "root":
		s.root.Signed.Version++
	case "timestamp":
		s.timestamp.Signed.Version++
	case "snapshot":
		s.snapshot.Signed.Version++
	default:
		s.lists[role].Signed.Version++
	}
}

// again publishes the same version of a role once more.
func (s *sim) again(role string) {
	s.t.Helper()
	switch role {
	case "root":
		s.root.Signed.Version--
	case "timestamp":
		s.timestamp.Signed.Version--
	case "snapshot":
		s.snapshot.Signed.Version--
	default:
		s.lists[role].Signed.Version--
	}
	s.publish(role)
}

func expirationCases() []simCase {
	return []simCase{
		{"expiration/root_expired", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.publish("root")
			s.refresh(true)
			s.root.Signed.Expires = days(-1)
			s.publish("root", "targets", "snapshot", "timestamp")
			s.refresh(false)
			s.holds(3, 1, 1, 1, 0) // kept before its date is looked at
		}},
		{"expiration/timestamp_expired", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.timestamp.Signed.Expires = days(-5)
			s.publish("timestamp")
			s.refresh(false)
			s.holds(1, 1, 1, 1, 0)
		}},
		{"expiration/snapshot_expired", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.snapshot.Signed.Expires = days(-5)
			s.publish("snapshot", "timestamp")
			s.refresh(false)
			s.holds(1, 2, 1, 1, 0)
		}},
		{"expiration/targets_expired", func(s *sim) {
			s.begin()
			s.refresh(true)
			s.lists["targets"].Signed.Expires = days(-5)
			s.all()
			s.refresh(false)
			s.holds(1, 2, 2, 1, 0)
		}},
		{"expiration/expired_local_root", func(s *sim) {
			s.begin()
			s.root.Signed.Expires = days(7)
			s.publish("root")
			s.refresh(true)
			s.later(false, days(18), "refresh")
			s.root.Signed.Expires = days(21)
			s.publish("root")
			s.later(true, days(18), "refresh")
			s.trusts("root", 3)
		}},
		{"expiration/expired_local_timestamp", func(s *sim) {
			s.begin()
			s.timestamp.Signed.Expires = days(7)
			s.publish("timestamp")
			s.refresh(true)
			s.later(false, days(18), "refresh")
			s.timestamp.Signed.Expires = days(21)
			s.all()
			s.later(true, days(18), "refresh")
			s.holds(1, 3, 2, 2, 0)
		}},
	}
}

func rollbackCases() []simCase {
	cases := []simCase{
		{"rollback/simple_snapshot_rollback", func(s *sim) {
			s.begin()
			s.publish("snapshot", "timestamp")
			s.refresh(true)
			s.withdraw("snapshot", 1) // the timestamp goes on naming 2
			s.refresh(true)
			s.lastAsked("timestamp")
			s.holds(1, 2, 2, 1, 0)
		}},
		{"rollback/new_timestamp_version_rollback", func(s *sim) {
			s.begin()
			s.publish("timestamp")
			s.refresh(true)
			s.withdraw("timestamp", 1)
			s.refresh(false)
			s.lastAsked("timestamp")
			s.trusts("timestamp", 2)
		}},
		{"rollback/targets_fast_forward_recovery", func(s *sim) {
			s.begin()
			for range 99 {
				s.publish("targets")
			}
			s.publish("snapshot", "timestamp")
			s.refresh(true)
			s.trusts("targets", 100)
			s.withdraw("targets", 99)
			s.lists["targets"].Signed.Version = 1
			s.all()
			s.refresh(false)
			s.trusts("targets", 100)
			s.rotate("snapshot")
			s.publish("root", "snapshot", "timestamp")
			s.refresh(true)
			s.trusts("targets", 2)
		}},
		{"rollback/new_snapshot_fast_forward_recovery", func(s *sim) {
			s.begin()
			for range 99 {
				s.publish("snapshot")
			}
			s.publish("timestamp")
			s.refresh(true)
			s.trusts("snapshot", 100)
			s.withdraw("snapshot", 99)
			s.snapshot.Signed.Version = 1
			s.publish("snapshot", "timestamp")
			s.refresh(false)
			s.trusts("snapshot", 100)
			s.rotate("snapshot")
			s.rotate("timestamp")
			s.publish("root", "snapshot", "timestamp")
			s.refresh(true)
			s.trusts("snapshot", 3)
		}},
		{"rollback/new_timestamp_fast_forward_recovery", func(s *sim) {
			s.begin()
			for range 99 {
				s.publish("timestamp")
			}
			s.refresh(true)
			s.trusts("timestamp", 100)
			s.timestamp.Signed.Version = 1
			s.publish("timestamp")
			s.refresh(false)
			s.trusts("timestamp", 100)
			s.rotate("timestamp")
			s.publish("root", "timestamp")
			s.refresh(true)
			s.trusts("timestamp", 3)
		}},
	}
	for _, hashes := range []bool{false, true} {
		kind := map[bool]string{false: "basic", true: "with hashes"}[hashes]
		cases = append(cases, simCase{"rollback/snapshot_rollback: " + kind, func(s *sim) {
			s.hashes = hashes
			s.begin()
			s.publish("snapshot", "timestamp")
			s.refresh(true)
			s.withdraw("snapshot", 2)
			s.snapshot.Signed.Version = 0
			s.publish("snapshot", "timestamp")
			s.refresh(false)
			s.lastAsked("timestamp")
			s.holds(1, 2, 2, 1, 0)
		}}, simCase{"rollback/targets_rollback: " + kind, func(s *sim) {
			s.hashes = hashes
			s.begin()
			s.publish("targets")
			s.all()
			s.refresh(true)
			s.holds(1, 2, 2, 3, 0)
			s.withdraw("targets", 2)
			s.lists["targets"].Signed.Version = 1
			s.all()
			s.refresh(false)
			s.lastAsked("snapshot 3")
			s.holds(1, 3, 2, 3, 0)
		}})
	}
	return cases
}
