// SPDX-License-Identifier: Apache-2.0

package loaderapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// clientLimit is longer than the loader gives itself for one request.
const clientLimit = WorkLimit + 10*time.Second

// Client asks the loader. It holds no connection: each call makes one. It may
// be used by several goroutines; the loader does one request at a time.
//
// A refusal comes back as *fault.Error with the loader's kind, code, text and
// hint, and with the Status after it. A loader that cannot be reached is
// Unavailable with code "loader_unreachable" and the zero Status.
type Client struct{ path string }

// Dial names the loader behind a socket, usually SocketPath.
func Dial(path string) *Client { return &Client{path} }

// Load hands over a signed manifest and a signed module. On return the kernel
// has taken the module; the transition may still run.
func (c *Client) Load(ctx context.Context, manifest, module *os.File) (Status, error) {
	a, err := c.ask(ctx, Request{Op: OpLoad}, manifest, module)
	return a.Status, err
}

// Status tells what the loader knows and sees.
func (c *Client) Status(ctx context.Context) (Status, error) {
	a, err := c.ask(ctx, Request{Op: OpStatus})
	return a.Status, err
}

// Confirm asks to confirm a loaded livepatch. Safe to repeat.
func (c *Client) Confirm(ctx context.Context, s livepatch.Sequence) (Status, error) {
	a, err := c.ask(ctx, Request{Op: OpConfirm, Sequence: s})
	return a.Status, err
}

// Cancel reverses the transition of a livepatch that has not finished.
func (c *Client) Cancel(ctx context.Context, s livepatch.Sequence) (Status, error) {
	a, err := c.ask(ctx, Request{Op: OpCancel, Sequence: s})
	return a.Status, err
}

// Blockers lists the tasks that keep a transition from finishing; none where
// no transition runs.
func (c *Client) Blockers(ctx context.Context) ([]Blocker, error) {
	a, err := c.ask(ctx, Request{Op: OpBlockers})
	return a.Blockers, err
}

// Disable takes our livepatch out until the next reboot. Only for uid 0.
func (c *Client) Disable(ctx context.Context) (Status, error) {
	a, err := c.ask(ctx, Request{Op: OpDisable})
	return a.Status, err
}

func (c *Client) ask(ctx context.Context, r Request, files ...*os.File) (Answer, error) {
	var a Answer
	r.Version = 1
	body, err := json.Marshal(r)
	if err != nil {
		return a, err
	}
	reply, err := c.exchange(ctx, body, files)
	if ctx.Err() != nil {
		return a, fmt.Errorf("ask the loader for %s: %w", r.Op, ctx.Err())
	}
	if err != nil {
		return a, fmt.Errorf("ask the loader for %s: %w", r.Op, err)
	}
	if a, err = ParseAnswer(reply); err != nil {
		return a, err
	}
	if f := a.Fault; f != nil {
		return a, &fault.Error{Kind: f.Kind, Code: f.Code, Text: f.Text, Hint: f.Hint}
	}
	return a, nil
}

// ParseAnswer reads an answer.
func ParseAnswer(body []byte) (Answer, error) {
	var a Answer
	if err := decode(body, &a); err != nil {
		return Answer{}, err
	}
	if a.Version != 1 {
		return Answer{}, fault.New(fault.Invalid, "message_version", "answer has version %d, want 1", a.Version)
	}
	return a, nil
}

func (c *Client) exchange(ctx context.Context, body []byte, files []*os.File) ([]byte, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := &conn{fd: fd, until: time.Now().Add(clientLimit)}
	if d, ok := ctx.Deadline(); ok && d.Before(s.until) {
		s.until = d
	}
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // wakes the blocked call below
		close(cut)
	})
	defer func() {
		if !stop() {
			<-cut // the number fd must not be used after Close
		}
		_ = unix.Close(fd)
	}()
	if err := s.connect(c.path); err != nil {
		return nil, err
	}
	if err := s.send(body, files); err != nil && !errors.Is(err, unix.EPIPE) {
		return nil, err // after EPIPE the refusal may be there to read
	}
	runtime.KeepAlive(files)
	reply, unasked, err := s.receive(MaxAnswer)
	CloseFiles(unasked)
	return reply, err
}

func (c *conn) connect(path string) error {
	if err := c.limit(unix.SO_SNDTIMEO); err != nil {
		return err
	}
	err := unix.Connect(c.fd, &unix.SockaddrUnix{Name: path})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fault.New(fault.Denied, "loader_denied", "connect to %s: %w", path, err).
			WithHint("only root and the user klatch may speak to the loader")
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return fault.New(fault.Unavailable, "loader_unreachable", "connect to %s: %w", path, err).
			WithHint("see whether the socket is there: systemctl status klatch-loader.socket")
	}
	return fmt.Errorf("connect to %s: %w", path, err)
}
