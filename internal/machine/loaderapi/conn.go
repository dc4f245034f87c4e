// SPDX-License-Identifier: Apache-2.0

package loaderapi

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
)

// maxFiles is what a request may bring: manifest and module of OpLoad.
const maxFiles = 2

// conn is a connected Unix stream socket. Everything on it ends at until.
type conn struct {
	fd    int
	until time.Time
}

// send writes one message; the descriptors travel with its first byte.
func (c *conn) send(body []byte, files []*os.File) error {
	msg := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, 0, len(files))
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		rights = unix.UnixRights(fds...)
	}
	for len(msg) > 0 {
		if err := c.limit(unix.SO_SNDTIMEO); err != nil {
			return err
		}
		n, err := unix.SendmsgN(c.fd, msg, rights, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return timedOut(err)
		}
		msg, rights = msg[n:], nil
	}
	return nil
}

// receive reads one message of at most limit bytes and the descriptors beside
// it, which the caller closes. With an error none stays open.
func (c *conn) receive(limit uint32) (body []byte, files []*os.File, err error) {
	defer func() {
		if err != nil {
			CloseFiles(files)
			files = nil
		}
	}()
	var head [4]byte
	if err := c.fill(head[:], &files); err != nil {
		return nil, files, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size == 0 || size > limit {
		return nil, files, fault.New(fault.Invalid, "message_size", "message has %d bytes, limit %d", size, limit)
	}
	body = make([]byte, size)
	return body, files, c.fill(body, &files)
}

// fill reads until p is full. It always offers room for descriptors, one more
// than allowed, so that none arrives unseen: those that find no room are
// closed by the kernel, which then sets MSG_CTRUNC (recvmsg(2)).
func (c *conn) fill(p []byte, files *[]*os.File) error {
	oob := make([]byte, unix.CmsgSpace(4*(maxFiles+1)))
	for len(p) > 0 {
		if err := c.limit(unix.SO_RCVTIMEO); err != nil {
			return err
		}
		n, oobn, flags, _, err := unix.Recvmsg(c.fd, p, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return timedOut(err)
		}
		controls, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return err
		}
		for _, m := range controls {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				return err
			}
			for _, fd := range fds {
				*files = append(*files, os.NewFile(uintptr(fd), "received file"))
			}
		}
		if len(*files) > maxFiles || flags&unix.MSG_CTRUNC != 0 {
			return fault.New(fault.Invalid, "too_many_files", "message brings more than %d files", maxFiles)
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		p = p[n:]
	}
	return nil
}

// limit gives the next system call the time that is left (socket(7)). A
// timeout of zero would mean none.
func (c *conn) limit(option int) error {
	left := time.Until(c.until)
	if left <= 0 {
		return timedOut(unix.EAGAIN)
	}
	tv := unix.NsecToTimeval(max(left, time.Millisecond).Nanoseconds())
	return unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, option, &tv)
}

func timedOut(err error) error {
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINPROGRESS) {
		return fault.New(fault.Unavailable, "timeout", "the other side of the loader's socket took too long")
	}
	return err
}

// decode reads JSON into v and refuses unknown fields and what follows.
func decode(body []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("bytes after the end")
		}
	}
	if err != nil {
		return fault.New(fault.Invalid, "message_malformed", "read message: %w", err)
	}
	return nil
}

// CloseFiles closes received descriptors; they were only read from.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
