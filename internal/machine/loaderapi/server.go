// SPDX-License-Identifier: Apache-2.0

package loaderapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
)

// Time limits of one connection: to receive the request or to send the
// answer, and for the work between.
const (
	TalkLimit = 5 * time.Second
	WorkLimit = 90 * time.Second
)

// ErrIdle is Accept's answer when nobody came.
var ErrIdle = errors.New("no request within the idle time")

// Listener is the loader's end of the socket.
type Listener struct{ fd int }

// Inherit takes the one socket that systemd opened (sd_listen_fds(3)).
func Inherit() (*Listener, error) {
	const first = 3
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || os.Getenv("LISTEN_FDS") != "1" {
		return nil, errors.New("systemd handed over no socket: start klatch-loader.socket")
	}
	listening, err := unix.GetsockoptInt(first, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listening != 1 {
		return nil, fmt.Errorf("descriptor %d is no listening socket: %w", first, err)
	}
	unix.CloseOnExec(first)
	return &Listener{first}, nil
}

// Listen makes the socket itself. Only tests and the demo do that.
func Listen(path string) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 16)); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), unix.Close(fd))
	}
	return &Listener{fd}, nil
}

// Close gives the socket up.
func (l *Listener) Close() error { return unix.Close(l.fd) }

// Accept waits for one connection; ErrIdle after the idle time.
func (l *Listener) Accept(idle time.Duration) (*Conn, error) {
	until := time.Now().Add(idle)
	for {
		ready := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, int(max(time.Until(until), 0).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("wait for a request: %w", err)
		}
		if n == 0 {
			return nil, ErrIdle
		}
		break
	}
	fd, _, err := unix.Accept4(l.fd, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("accept: %w", err)
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look who asks: %w", err), unix.Close(fd))
	}
	return &Conn{UID: peer.Uid, c: conn{fd: fd}}, nil
}

// Conn is one connection: one request, one answer.
type Conn struct {
	UID uint32 // of the peer when it connected, by the kernel (SO_PEERCRED)
	c   conn
}

// Close ends the connection.
func (c *Conn) Close() error { return unix.Close(c.c.fd) }

// Receive reads the request and its files, which the caller closes: manifest
// and module for OpLoad, none for any other. With an error none stays open.
func (c *Conn) Receive() (Request, []*os.File, error) {
	c.c.until = time.Now().Add(TalkLimit)
	body, files, err := c.c.receive(MaxMessage)
	if err != nil {
		return Request{}, nil, err
	}
	r, err := ParseRequest(body, len(files))
	if err != nil {
		CloseFiles(files)
		return Request{}, nil, err
	}
	return r, files, nil
}

// Answer sends the answer; err, if not nil, becomes its fault.
func (c *Conn) Answer(a Answer, err error) error {
	a.Version = 1
	if err != nil {
		a.Fault = &Fault{Kind: fault.KindOf(err), Code: fault.CodeOf(err), Text: err.Error(), Hint: fault.HintOf(err)}
	}
	body, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	c.c.until = time.Now().Add(TalkLimit)
	return c.c.send(body, nil)
}

// ParseRequest reads a request in the one form that Client writes.
func ParseRequest(body []byte, files int) (Request, error) {
	var r Request
	if err := decode(body, &r); err != nil {
		return r, err
	}
	if again, err := json.Marshal(r); err != nil || !bytes.Equal(again, body) {
		return r, fault.New(fault.Invalid, "message_malformed", "request is not in its one form")
	}
	if r.Version != 1 {
		return r, fault.New(fault.Invalid, "message_version", "request has version %d, want 1", r.Version)
	}
	want, sequence := 0, false
	switch r.Op {
	case OpLoad:
		want = maxFiles
	case OpConfirm, OpCancel:
		sequence = true
	case OpStatus, OpBlockers, OpDisable:
	default:
		return r, fault.New(fault.Invalid, "unknown_request", "the loader has no request %.40q", r.Op)
	}
	if files != want || (r.Sequence != 0) != sequence {
		return r, fault.New(fault.Invalid, "bad_request", "request %s with %d files and sequence %d", r.Op, files, r.Sequence)
	}
	return r, nil
}
