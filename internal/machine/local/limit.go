// SPDX-License-Identifier: Apache-2.0

package local

import (
	"net"
	"sync"
)

// maxConnections is how many connections one user may have; root has no limit.
// Everybody may connect, and each connection takes memory of the daemon's.
const maxConnections = 16

// limited accepts connections up to a user's limit and closes those above it.
type limited struct {
	net.Listener
	mu   sync.Mutex
	open map[uint32]int
}

// Accept waits for a connection within its user's limit.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid := peer(c)
		if uid == 0 {
			return c, nil
		}
		if l.add(uid, 1) <= maxConnections {
			return &counted{Conn: c, uid: uid, end: sync.OnceFunc(func() { l.add(uid, -1) })}, nil
		}
		l.add(uid, -1)
		_ = c.Close() // it is told nothing: that would be work
	}
}

func (l *limited) add(uid uint32, n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[uid] += n
	now := l.open[uid]
	if now == 0 {
		delete(l.open, uid)
	}
	return now
}

type counted struct {
	net.Conn
	uid uint32
	end func()
}

// Close gives the place up.
func (c *counted) Close() error {
	c.end()
	return c.Conn.Close()
}
