// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// qmpLimit bounds one command to the emulator. It answers at once unless it
// hangs, and a hanging emulator must not hang the gate.
const qmpLimit = 15 * time.Second

// guestReset is the reason in the SHUTDOWN event when the guest restarts
// (qapi/run-state.json, ShutdownCause). A guest that switches itself off, or
// an emulator that dies, gives another reason or none.
const guestReset = "guest-reset"

// qmp speaks QEMU's machine protocol, one command at a time. It is a page of
// code; the libraries for it bring generated code for hundreds of commands,
// of which the lab uses two.
type qmp struct {
	conn    net.Conn
	mu      sync.Mutex
	answers chan qmpMessage
	ended   chan struct{} // closed when the emulator's side is closed
	reason  string        // of the SHUTDOWN event; read after ended
}

type qmpMessage struct {
	Return json.RawMessage
	Error  *struct{ Desc string }
	Event  string
	Data   struct{ Reason string }
}

// newQMP takes over the connection. The emulator does nothing before the
// first command is said, not even events.
func newQMP(conn net.Conn) (*qmp, error) {
	q := &qmp{conn: conn, answers: make(chan qmpMessage), ended: make(chan struct{})}
	go q.read()
	return q, q.do(context.Background(), "qmp_capabilities", nil)
}

func (q *qmp) close() { _ = q.conn.Close() }

func (q *qmp) read() {
	defer close(q.ended)
	for in := json.NewDecoder(q.conn); ; {
		var m qmpMessage
		if err := in.Decode(&m); err != nil {
			return
		}
		switch {
		case m.Event == "SHUTDOWN":
			q.reason = m.Data.Reason
		case m.Return != nil || m.Error != nil:
			select {
			case q.answers <- m:
			case <-time.After(qmpLimit): // nobody waits any more
			}
		}
	}
}

func (q *qmp) do(ctx context.Context, command string, arguments map[string]any) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, qmpLimit)
	defer cancel()
	msg := map[string]any{"execute": command}
	if arguments != nil {
		msg["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(msg); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case m := <-q.answers:
		if m.Error != nil {
			return fmt.Errorf("qmp %s: %w", command, errors.New(m.Error.Desc))
		}
		return nil
	case <-q.ended:
		return fmt.Errorf("qmp %s: monitor closed", command)
	case <-ctx.Done():
		q.close() // a late answer would be taken for the next one's
		return fmt.Errorf("qmp %s: %w", command, ctx.Err())
	}
}
