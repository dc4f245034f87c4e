// SPDX-License-Identifier: Apache-2.0

// Package loaderclient asks klatch-loader. klatchd and klatch use it; it is
// apart from package loaderapi so that what runs as root holds neither a
// client nor package net.
package loaderclient

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
)

// limit is longer than the loader gives itself for one request.
const limit = loaderapi.WorkLimit + 2*loaderapi.TalkLimit

// Client asks the loader. It holds no connection: each call makes one. It may
// be used by several goroutines; the loader does one request at a time.
//
// A refusal comes back as *fault.Error with the loader's kind, code, text and
// hint, together with the Status after it. A loader that cannot be reached is
// Unavailable with code "loader_unreachable"; one that hung up, Unavailable
// with code "loader_gone". Both come with the zero Status.
type Client struct{ path string }

// Dial names the loader behind a socket, usually loaderapi.SocketPath. It does
// not connect yet.
func Dial(path string) *Client { return &Client{path} }

// Load hands over a signed manifest and a signed module. On return the kernel
// has taken the module; the transition may still run.
func (c *Client) Load(ctx context.Context, manifest, module *os.File) (loaderapi.Status, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpLoad}, manifest, module)
	return a.Status, err
}

// Recall hands over the publisher's signed recalls.
func (c *Client) Recall(ctx context.Context, recalls *os.File) (loaderapi.Status, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpRecall}, recalls)
	return a.Status, err
}

// Status tells what the loader knows and sees.
func (c *Client) Status(ctx context.Context) (loaderapi.Status, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpStatus})
	return a.Status, err
}

// Confirm asks to confirm a loaded livepatch. Safe to repeat.
func (c *Client) Confirm(ctx context.Context, s livepatch.Sequence) (loaderapi.Status, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpConfirm, Sequence: s})
	return a.Status, err
}

// Cancel reverses the transition of a livepatch that has not finished.
func (c *Client) Cancel(ctx context.Context, s livepatch.Sequence) (loaderapi.Status, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpCancel, Sequence: s})
	return a.Status, err
}

// Blockers lists the tasks that keep a transition from finishing; none where
// no transition runs.
func (c *Client) Blockers(ctx context.Context) ([]loaderapi.Blocker, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpBlockers})
	return a.Blockers, err
}

// Tracers tells who else is attached to functions of the kernel, in the
// kernel's words; package tracer reads them.
func (c *Client) Tracers(ctx context.Context) (string, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpTracers})
	return a.Tracers, err
}

// Disable takes our livepatch out until the next reboot. Only for uid 0.
func (c *Client) Disable(ctx context.Context) (loaderapi.Status, error) {
	a, err := c.ask(ctx, loaderapi.Request{Op: loaderapi.OpDisable})
	return a.Status, err
}

func (c *Client) ask(ctx context.Context, r loaderapi.Request, files ...*os.File) (loaderapi.Answer, error) {
	r.Version = 1
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	body, err := json.Marshal(r)
	if err != nil {
		return loaderapi.Answer{}, err
	}
	reply, err := c.exchange(ctx, body, files)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return loaderapi.Answer{}, fmt.Errorf("ask the loader for %s: %w", r.Op, err)
	}
	a, err := ParseAnswer(reply)
	if err != nil {
		return loaderapi.Answer{}, err
	}
	if f := a.Fault; f != nil {
		return a, &fault.Error{Kind: f.Kind, Code: f.Code, Text: f.Text, Hint: f.Hint}
	}
	return a, nil
}

func (c *Client) exchange(ctx context.Context, body []byte, files []*os.File) ([]byte, error) {
	var d net.Dialer
	generic, err := d.DialContext(ctx, "unix", c.path)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fault.New(fault.Denied, "loader_denied", "%w", err).
			WithHint("only root and the user klatch may speak to the loader")
	}
	if err != nil {
		return nil, fault.New(fault.Unavailable, "loader_unreachable", "%w", err).
			WithHint("see whether the socket is there: systemctl status klatch-loader.socket")
	}
	s := generic.(*net.UnixConn) //nolint:errcheck // what "unix" gives
	defer s.Close()              //nolint:errcheck // one request, one answer
	defer context.AfterFunc(ctx, func() { _ = s.SetDeadline(time.Unix(1, 0)) })()

	var rights []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		rights = syscall.UnixRights(fds...)
	}
	msg := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...) //nolint:gosec // a request is a few bytes
	_, _, err = s.WriteMsgUnix(msg, rights, nil)
	runtime.KeepAlive(files)
	if err != nil && !errors.Is(err, syscall.EPIPE) { // then a refusal may be there to read
		return nil, gone(err)
	}
	var head [4]byte
	if _, err := io.ReadFull(s, head[:]); err != nil {
		return nil, gone(err)
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > loaderapi.MaxAnswer {
		return nil, fmt.Errorf("answer has %d bytes, limit %d", size, loaderapi.MaxAnswer)
	}
	reply := make([]byte, size)
	if _, err := io.ReadFull(s, reply); err != nil {
		return nil, gone(err)
	}
	return reply, nil
}

func gone(err error) error {
	return fault.New(fault.Unavailable, "loader_gone", "the loader hung up: %w", err).
		WithHint("ask for its status, then repeat; journalctl -u klatch-loader says why")
}

// ParseAnswer reads an answer; unknown fields are refused.
func ParseAnswer(body []byte) (loaderapi.Answer, error) {
	var a loaderapi.Answer
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		return loaderapi.Answer{}, fault.New(fault.Internal, "message_malformed", "read the loader's answer: %w", err)
	}
	if a.Version != 1 {
		return loaderapi.Answer{}, fault.New(fault.Internal, "message_version", "the loader's answer has version %d, want 1", a.Version)
	}
	return a, nil
}
