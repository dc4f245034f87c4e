// SPDX-License-Identifier: Apache-2.0

package loaderapi

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
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

// maxFiles is what a request may bring: manifest and module of OpLoad.
const maxFiles = 2

// ErrIdle is Accept's answer when nobody came.
var ErrIdle = errors.New("no request within the idle time")

// Listener is the loader's end of the socket.
type Listener struct{ f *os.File }

// On takes a listening socket over.
func On(fd int) (*Listener, error) {
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on != 1 {
		return nil, fmt.Errorf("descriptor %d is not a listening socket", fd)
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil { // so that os.File has deadlines
		return nil, err
	}
	return &Listener{os.NewFile(uintptr(fd), "loader socket")}, nil
}

// Close gives the socket up.
func (l *Listener) Close() error { return l.f.Close() }

// Accept waits for one connection; ErrIdle after the idle time.
func (l *Listener) Accept(idle time.Duration) (*Conn, error) {
	if err := l.f.SetReadDeadline(time.Now().Add(idle)); err != nil {
		return nil, err
	}
	var fd int
	err := whenReady(l.f, func(s int) (err error) {
		fd, _, err = unix.Accept4(s, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return err
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, ErrIdle
	}
	if err != nil {
		return nil, fmt.Errorf("accept: %w", err)
	}
	c := &Conn{f: os.NewFile(uintptr(fd), "connection")}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look who asks: %w", err), c.Close())
	}
	c.UID = peer.Uid
	return c, nil
}

// whenReady repeats a call until it would not block, within f's deadline.
func whenReady(f *os.File, call func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Read(func(fd uintptr) bool {
		for result = unix.EINTR; errors.Is(result, unix.EINTR); {
			result = call(int(fd))
		}
		return !errors.Is(result, unix.EAGAIN)
	})
	return errors.Join(err, result)
}

// Conn is one connection: one request, one answer.
type Conn struct {
	UID uint32 // of the peer when it connected, by the kernel (SO_PEERCRED)
	f   *os.File
}

// Close ends the connection.
func (c *Conn) Close() error { return c.f.Close() }

// Receive reads the request and its files, which the caller closes: manifest
// and module for OpLoad, recalls for OpRecall, none for any other. With an error none stays open.
func (c *Conn) Receive() (r Request, files []*os.File, err error) {
	defer func() {
		if err != nil {
			CloseFiles(files)
			files = nil
		}
	}()
	if err := c.f.SetDeadline(time.Now().Add(TalkLimit)); err != nil {
		return r, nil, err
	}
	var head [4]byte
	if err := c.fill(head[:], &files); err != nil {
		return r, files, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size == 0 || size > MaxMessage {
		return r, files, fault.New(fault.Invalid, "message_size", "request has %d bytes, limit %d", size, MaxMessage)
	}
	body := make([]byte, size)
	if err := c.fill(body, &files); err != nil {
		return r, files, err
	}
	r, err = ParseRequest(body, len(files))
	return r, files, err
}

// fill reads until p is full. It always offers room for descriptors, one more
// than allowed, so that none arrives unseen: those that find no room are
// closed by the kernel, which then sets MSG_CTRUNC (recvmsg(2)).
func (c *Conn) fill(p []byte, files *[]*os.File) error {
	for len(p) > 0 {
		oob := make([]byte, unix.CmsgSpace(4*(maxFiles+1)))
		var n, oobn, flags int
		err := whenReady(c.f, func(fd int) (err error) {
			n, oobn, flags, _, err = unix.Recvmsg(fd, p, oob, unix.MSG_CMSG_CLOEXEC)
			return err
		})
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		controls, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return err
		}
		for i := range controls {
			fds, err := unix.ParseUnixRights(&controls[i])
			if err != nil {
				return err
			}
			for _, fd := range fds {
				*files = append(*files, os.NewFile(uintptr(fd), "received file"))
			}
		}
		if len(*files) > maxFiles || flags&unix.MSG_CTRUNC != 0 {
			return fault.New(fault.Invalid, "too_many_files", "request brings more than %d files", maxFiles)
		}
		if n == 0 {
			return fmt.Errorf("receive: %w", io.ErrUnexpectedEOF)
		}
		p = p[n:]
	}
	return nil
}

// CloseFiles closes received descriptors; they were only read from.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// Answer sends the answer; err, if not nil, becomes its fault.
func (c *Conn) Answer(a Answer, err error) error {
	a.Version = 1
	if err != nil {
		a.Fault = &fault.Wire{Kind: fault.KindOf(err), Code: fault.CodeOf(err), Text: err.Error(), Hint: fault.HintOf(err)}
	}
	body, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	if err := c.f.SetDeadline(time.Now().Add(TalkLimit)); err != nil {
		return err
	}
	_, err = c.f.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)) //nolint:gosec // below MaxAnswer
	return err
}

// ParseRequest reads a request in the one form that a client writes: no
// unknown or repeated field, no other spelling, nothing after it.
func ParseRequest(body []byte, files int) (Request, error) {
	var r Request
	err := json.Unmarshal(body, &r)
	if again, e := json.Marshal(r); err != nil || e != nil || !bytes.Equal(again, body) {
		return r, fault.New(fault.Invalid, "message_malformed", "request is not in its one form")
	}
	if r.Version != 1 {
		return r, fault.New(fault.Invalid, "message_version", "request has version %d, want 1", r.Version)
	}
	want, sequence := 0, false
	switch r.Op {
	case OpLoad:
		want = maxFiles
	case OpRecall:
		want = 1
	case OpConfirm, OpCancel:
		sequence = true
	case OpStatus, OpBlockers, OpTracers, OpDisable:
	default:
		return r, fault.New(fault.Invalid, "unknown_request", "the loader has no request %.40q", r.Op)
	}
	if files != want || (r.Sequence != 0) != sequence {
		return r, fault.New(fault.Invalid, "bad_request", "request %s with %d files and sequence %d", r.Op, files, r.Sequence)
	}
	return r, nil
}
