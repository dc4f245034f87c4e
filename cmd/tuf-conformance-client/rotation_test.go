// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"

	"klatch/internal/testkit/tufsim"
)

// keyed is one version of a role: which of ten keys it has, how many must
// sign, and which do. Each digit is a key.
type keyed struct {
	keys      string
	threshold int
	signed    string
}

func pick(digits string) []crypto.Signer {
	ten := tufsim.Signers("rotation", 10)
	var keys []crypto.Signer
	for _, d := range digits {
		keys = append(keys, ten[d-'0'])
	}
	return keys
}

// Chains of roots. The first is the trusted one; where ok is false the last
// must be refused, and the one before it kept.
var rootRotations = []struct {
	name  string
	chain []keyed
	ok    bool
}{
	{"1-of-1-key-rotation", []keyed{{"1", 1, "1"}, {"2", 1, "21"}, {"2", 1, "2"}}, true},
	{"1-of-1-key-rotation-unused-signatures", []keyed{{"1", 1, "314"}, {"2", 1, "3214"}, {"2", 1, "324"}}, true},
	{"3-of-5-sign-with-different-keycombos", []keyed{{"01234", 3, "024"}, {"01234", 3, "041"}, {"01234", 3, "013"}, {"01234", 3, "013"}}, true},
	{"3-of-5-one-key-rotated", []keyed{{"01234", 3, "024"}, {"01345", 3, "041"}}, true},
	{"3-of-5-one-key-rotated-with-intermediate-step", []keyed{{"01234", 3, "024"}, {"01345", 3, "0245"}, {"01345", 3, "045"}}, true},
	{"3-of-5-all-keys-rotated-with-intermediate-step", []keyed{{"01234", 3, "024"}, {"56789", 3, "024567"}, {"56789", 3, "567"}}, true},
	{"1-of-3-threshold-increase-to-2-of-3", []keyed{{"123", 1, "1"}, {"123", 2, "12"}}, true},
	{"2-of-3-threshold-decrease-to-1-of-3", []keyed{{"123", 2, "12"}, {"123", 1, "12"}, {"123", 1, "1"}}, true},
	{"1-of-2-threshold-increase-to-2-of-2", []keyed{{"1", 1, "1"}, {"12", 2, "12"}}, true},
	{"1-of-1-key-rotation-fail-not-signed-with-old-key", []keyed{{"1", 1, "1"}, {"2", 1, "234"}}, false},
	{"1-of-1-key-rotation-fail-not-signed-with-new-key", []keyed{{"1", 1, "1"}, {"2", 1, "134"}}, false},
	{"3-of-5-one-key-rotate-fails-not-signed-with-3-new-keys", []keyed{{"01234", 3, "024"}, {"01345", 3, "024"}}, false},
	{"3-of-5-one-key-rotate-fails-not-signed-with-3-old-keys", []keyed{{"01234", 3, "024"}, {"01345", 3, "045"}}, false},
	{"1-of-3-threshold-bump-to-2-of-3-fails-new-threshold-not-reached", []keyed{{"123", 1, "1"}, {"123", 2, "2"}}, false},
	{"2-of-3-threshold-decr-to-1-of-3-fails-old-threshold-not-reached", []keyed{{"123", 2, "12"}, {"123", 1, "1"}}, false},
}

// New keys of timestamp, of snapshot and of targets, each in a repository of
// its own: the suite keeps one, where a bad timestamp hides the other two.
var otherRotations = []struct {
	name string
	next keyed
	ok   bool
}{
	{"1-of-1-key-rotation", keyed{"2", 1, "2"}, true},
	{"1-of-1-key-rotation-unused-signatures", keyed{"1", 1, "314"}, true},
	{"1-of-1-key-rotation-fail-not-signed-with-new-key", keyed{"2", 1, "134"}, false},
	{"3-of-5-one-key-signature-wrong-not-signed-with-3-expected-keys", keyed{"01345", 3, "024"}, false},
	{"2-of-5-one-key-signature-missing-threshold-not-reached", keyed{"01345", 3, "04"}, false},
	{"3-of-5-sign-first-combo", keyed{"01234", 3, "024"}, true},
	{"3-of-5-sign-second-combo", keyed{"01234", 3, "041"}, true},
	{"3-of-5-sign-third-combo", keyed{"01234", 3, "013"}, true},
	{"3-of-5-sign-fourth-combo", keyed{"01234", 3, "123"}, true},
	{"3-of-5-sign-fifth-combo", keyed{"01234", 3, "234"}, true},
}

func rotationCases() (cases []simCase) {
	for _, tt := range rootRotations {
		cases = append(cases, simCase{"key rotation/root: " + tt.name, func(s *sim) {
			s.withdraw("root", 1)
			s.root.Signed.Version = 0
			for _, v := range tt.chain {
				s.setKeys("root", v.threshold, pick(v.keys), pick(v.signed))
				s.publish("root")
			}
			s.begin()
			s.refresh(tt.ok)
			if tt.ok {
				s.same("root")
				s.holds(int64(len(tt.chain)), 1, 1, 1, 0)
			} else {
				s.withdraw("root", 1)
				s.same("root")
				s.holds(int64(len(tt.chain))-1, 0, 0, 0, 0)
			}
		}})
	}
	for _, tt := range otherRotations {
		cases = append(cases, simCase{"key rotation/others: " + tt.name, func(s *sim) {
			for i, role := range []string{"timestamp", "snapshot", "targets"} {
				s := newSim(s.t)
				s.setKeys(role, tt.next.threshold, pick(tt.next.keys), pick(tt.next.signed))
				s.publish("root")
				s.all()
				s.begin()
				s.refresh(tt.ok)
				if tt.ok {
					s.same("root", "timestamp", "snapshot", "targets")
					continue
				}
				have := []int64{0, 0, 0}
				for j := range i { // those before it are good
					have[j] = 2
				}
				s.holds(2, have[0], have[1], have[2], 0)
			}
		}})
	}
	return cases
}
