// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

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
			for _, role := range strings.Fields(tt.order) {
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
	return cases
}

// walk is the requests of a first look at versions 2, with roles visited.
func (s *sim) walk(order string) []string {
	asked := []string{"root 2", "timestamp", "snapshot 2", "targets 2"}
	for _, r := range strings.Fields(order) {
		asked = append(asked, r+" 1")
	}
	return asked
}
