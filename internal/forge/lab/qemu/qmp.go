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

// qmp speaks QEMU's machine protocol: one command at a time, events are
// ignored. It is a page of code; the libraries for it bring generated code
// for hundreds of commands, of which the lab uses three.
type qmp struct {
	mu    sync.Mutex
	conn  net.Conn
	in    *json.Decoder
	ready bool
}

func newQMP(conn net.Conn) *qmp { return &qmp{conn: conn, in: json.NewDecoder(conn)} }

func (q *qmp) close() { _ = q.conn.Close() }

// do runs one command. After an error the connection is in an unknown state
// and refuses everything.
func (q *qmp) do(ctx context.Context, command string, arguments map[string]any) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, qmpLimit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = q.conn.SetDeadline(time.Now()) })
	defer stop()
	if !q.ready {
		if err := q.exchange("qmp_capabilities", nil); err != nil {
			return err
		}
		q.ready = true
	}
	return q.exchange(command, arguments)
}

func (q *qmp) exchange(command string, arguments map[string]any) error {
	msg := map[string]any{"execute": command}
	if arguments != nil {
		msg["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(msg); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	for {
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := q.in.Decode(&answer); err != nil {
			return fmt.Errorf("qmp %s: %w", command, err)
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("qmp %s: %w", command, errors.New(answer.Error.Desc))
		case answer.Return != nil:
			return nil
		}
	}
}
