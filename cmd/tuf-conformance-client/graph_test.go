// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// graph builds roles from lines "PARENT CHILD [PATTERNS]"; a child whose name
// ends in ! is terminating. Without patterns it has every path of one part.
func (s *sim) graph(lines ...string) {
	s.t.Helper()
	for _, l := range lines {
		f := strings.Fields(l)
		name, terminating := strings.CutSuffix(f[1], "!")
		paths := []string{"*"}
		if len(f) > 2 {
			paths = f[2:]
		}
		s.delegate(f[0], metadata.DelegatedRole{Name: name, Terminating: terminating, Paths: paths})
	}
	for role, l := range s.lists {
		if l.Signed.Version == 0 {
			s.publish(role)
		}
	}
	s.all()
}

// The order in which roles are visited for a target that none of them lists:
// depth first, in the order of the parent's list.
var visits = []struct{ name, roles, order string }{
	{"basic-delegation", "targets A", "A"},
	{"single-level-delegations", "targets A, targets B", "A B"},
	{"two-level-delegations", "targets A, targets B, B C", "A B C"},
	{"two-level-test-DFS-order-of-traversal", "targets A, targets B, A C, A D", "A C D B"},
	{"three-level-delegation-test-DFS-order-of-traversal", "targets A, targets B, A C, C D", "A C D B"},
	{"two-level-terminating-ignores-all-but-roles-descendants", "targets A, targets B, A C!, A D", "A C"},
	{"three-level-terminating-ignores-all-but-roles-descendants", "targets A, targets B, A C!, C D", "A C D"},
	{"two-level-ignores-all-branches-not-matching-paths", "targets A *.py, targets B, A C", "B"},
	{"three-level-ignores-all-branches-not-matching-paths", "targets A, targets B, A C *.py, C D", "A B"},
	{"cyclic-graph", "targets A, targets B, B C, C D, D B", "A B C D"},
	{"two-roles-delegating-to-a-third", "targets A, targets B, B C, A C", "A C B"},
	{"two-roles-delegating-to-a-third-different-paths", "targets A, targets B, B C, A C *.py", "A B C"},
}

// Which role's target is found, in one tree.
var searches = []struct {
	name, target string
	content      string // "" is not found
	order        string
}{
	{"no delegations", "targetfile", "by targets", ""},
	{"targetpath matches wildcard", "README.md", "by A", "A"},
	{"targetpath with separators x", "releases/x/x_v1", "by C", "B C"},
	{"targetpath with separators y", "releases/y/y_v1.zip", "by D", "B D"},
	{"targetpath is not delegated by all roles in the chain", "releases/z/z_v1.zip", "", "B"},
}

func graphCases() (cases []simCase) {
	for _, tt := range visits {
		cases = append(cases, simCase{"delegation graphs/visits: " + tt.name, func(s *sim) {
			s.begin()
			s.graph(strings.Split(tt.roles, ", ")...)
			s.download(false, "missing")
			s.requests(s.walk(tt.order)...)
			s.holds(1, 2, 2, 2, len(strings.Fields(tt.order)))
			// What was visited is what can be found, in that order.
			for role := range strings.FieldsSeq(tt.order) {
				s.same(role)
			}
		}})
	}
	for _, tt := range searches {
		cases = append(cases, simCase{"delegation graphs/search: " + tt.name, func(s *sim) {
			s.begin()
			for _, r := range []string{"A", "B", "C", "D"} {
				s.list(r)
			}
			s.add("targets", "targetfile", "by targets")
			s.add("A", "README.md", "by A")
			s.add("C", "releases/x/x_v1", "by C")
			s.add("D", "releases/y/y_v1.zip", "by D")
			s.add("D", "releases/z/z_v1.zip", "by D")
			s.graph("targets A *.doc *.md", "targets B releases/*/*", "B C releases/x/*", "B D releases/y/*.zip")
			s.download(tt.content != "", tt.target)
			if tt.content == "" {
				s.downloaded()
			} else {
				s.downloaded(tt.content)
			}
			s.requests(s.walk(tt.order)...)
		}})
	}
	for _, tt := range bins {
		cases = append(cases, simCase{fmt.Sprintf("delegation graphs/ours: %d of %d bins: %s", tt.bin, 1<<tt.bits, tt.target), func(s *sim) {
			s.begin()
			name := s.bins(tt.bits, tt.bin)
			s.add(name, tt.target, "content")
			s.publish(name)
			s.all()
			s.download(true, tt.target)
			s.requests(s.walk(name)...)
		}})
	}
	return append(cases, delegatedExpirationCases()...)
}

// Which of the bins of succinct roles (TAP 15) has a path: the first bits of
// its SHA-256.
var bins = []struct {
	bits, bin int
	target    string
}{
	{1, 0, "boo"}, {1, 1, "too"}, {2, 0, "foo"}, {2, 1, "doo"}, {2, 2, "too"}, {2, 3, "bar"}, {8, 0xfc, "bar"},
}

// bins has targets delegate to bins of one key, and names one of them. Only
// that one exists: another one would not be found.
func (s *sim) bins(bits, bin int) string {
	s.t.Helper()
	name := fmt.Sprintf("bin-%0*x", len(fmt.Sprintf("%x", 1<<bits-1)), bin)
	s.list(name)
	p := &s.lists["targets"].Signed
	p.Delegations = &metadata.Delegations{
		Keys: map[string]*metadata.Key{}, SuccinctRoles: &metadata.SuccinctRoles{KeyIDs: []string{}, Threshold: 1, BitLength: bits, NamePrefix: "bin"},
	}
	s.check(p.AddKey(s.public(s.signers[name][0]), name))
	return name
}

// delegatedExpirationCases are of a version of the suite after the one that is
// counted in docs/reference/keys.md.
func delegatedExpirationCases() []simCase {
	publish := func(s *sim, until time.Time) {
		s.begin()
		s.add("delegated", "sub/first", "first")
		s.add("delegated", "sub/second", "second")
		s.list("delegated").Expires = until
		s.graph("targets delegated sub/*")
	}
	return []simCase{
		{"expiration/ours: delegated_targets_expired", func(s *sim) {
			publish(s, days(-1))
			s.refresh(true)
			s.download(false, "sub/first")
			s.downloaded()
			s.holds(1, 2, 2, 2, 0)
		}},
		{"expiration/ours: expired_local_delegated_targets", func(s *sim) {
			publish(s, days(7))
			s.download(true, "sub/first")
			s.later(false, days(18), s.fetch("sub/second")...)
			s.downloaded("first")
		}},
		{"expiration/ours: expired_local_delegated_targets_updates", func(s *sim) {
			publish(s, days(7))
			s.download(true, "sub/first")
			s.list("delegated").Expires = days(21)
			s.publish("delegated", "snapshot", "timestamp")
			s.later(true, days(18), s.fetch("sub/second")...)
			s.downloaded("first", "second")
		}},
	}
}

// walk is the requests of a first look at versions 2, with roles visited.
func (s *sim) walk(order string) []string {
	asked := []string{"root 2", "timestamp", "snapshot 2", "targets 2"}
	for r := range strings.FieldsSeq(order) {
		asked = append(asked, r+" 1")
	}
	return asked
}
