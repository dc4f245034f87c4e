// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"testing"

	"klatch/internal/livepatch"
)

// story is a publisher, a server that copies from it, and one enrolled
// machine without a livepatch.
type story struct {
	*machine
	made   made
	pub    *publisher
	server *server
}

func newStory(t *testing.T, conf string) *story {
	t.Helper()
	m := everything(t)
	p := newPublisher(t, "e2e", m)
	s := newServer(t, m)
	s.init(p)
	s.sync(p.Dir)
	s.start()
	g := bootMachine(t, m, p)
	g.install(conf)
	g.enroll(s.fleet, s.token())
	return &story{g, m, p, s}
}

// offer publishes livepatch n and has the server take it.
func (s *story) offer(n livepatch.Sequence) {
	s.t.Helper()
	s.pub.release(n, s.pub.livepatch(n))
	s.server.sync(s.pub.Dir)
}
