// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"klatch/internal/forge/lab"
)

// grace is what a guest may take beyond a command's own time limit to kill
// it and to send its output: two emulated CPUs on a busy machine are slow.
const grace = 20 * time.Second

// A large answer takes minutes on a real serial line. While one is coming, no
// wait for an answer ends: longAnswer bytes without a newline are one, and
// longPause is how long it may stop. maxPatience bounds it all.
const (
	longAnswer  = 16 << 10
	longPause   = 20 * time.Second
	maxPatience = time.Hour
)

// pingEvery is how often Await asks an agent that has not spoken yet.
const pingEvery = 500 * time.Millisecond

// ErrLineClosed is the end of the line: the emulator is gone, or the cable.
var ErrLineClosed = errors.New("line closed")

// errAgentRestarted: the kernel is the same, the agent is not. Somebody in
// the guest killed it, or the guest ran out of memory.
var errAgentRestarted = errors.New("guest agent restarted")

// Client is the outside end of the line. Its methods may be called
// concurrently: commands run side by side, files go through one at a time.
type Client struct {
	line io.ReadWriteCloser

	writing sync.Mutex // one request on the line at a time

	coming atomic.Int64 // when a part of a long answer came last, in Unix nanoseconds

	mu      sync.Mutex
	nextID  int
	waiting map[string]chan response
	hello   Hello
	changed chan struct{} // closed and replaced when hello changes
	closed  error         // why reading ended
	lost    error         // why the last unanswered requests were given up
}

// NewClient takes over a line. Close ends it.
func NewClient(line io.ReadWriteCloser) *Client {
	c := &Client{line: line, waiting: map[string]chan response{}, changed: make(chan struct{})}
	go c.read()
	return c
}

// Close closes the line and fails everybody who waits.
func (c *Client) Close() error { return c.line.Close() }

// Await returns when the agent answers with a boot id other than the given
// one.
func (c *Client) Await(ctx context.Context, notBootID string) (Hello, error) {
	ping := time.NewTicker(pingEvery)
	defer ping.Stop()
	for {
		c.mu.Lock()
		hello, changed, closed := c.hello, c.changed, c.closed
		c.mu.Unlock()
		if hello.BootID != "" && hello.BootID != notBootID {
			if hello.Protocol != protocol {
				return hello, fmt.Errorf("guest agent speaks protocol %d, want %d", hello.Protocol, protocol)
			}
			return hello, nil
		}
		if closed != nil {
			return Hello{}, closed
		}
		select {
		case <-changed:
		case <-ping.C:
			go c.send(request{ID: "ping", Op: opPing}) //nolint:errcheck // a ping nobody hears is repeated
		case <-ctx.Done():
			return Hello{}, fmt.Errorf("guest agent does not answer: %w", context.Cause(ctx))
		}
	}
}

// Hello is what the agent last said about itself.
func (c *Client) Hello() Hello {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hello
}

// Run runs a program in the guest.
func (c *Client) Run(ctx context.Context, cmd lab.Command) (lab.Result, error) {
	if len(cmd.Argv) == 0 {
		return lab.Result{}, errors.New("run in guest: empty command")
	}
	timeout := cmd.Timeout
	if timeout <= 0 {
		timeout = lab.DefaultTimeout
	}
	limit := cmd.MaxOutput
	if limit <= 0 {
		limit = lab.DefaultMaxOutput
	}
	req := request{Op: opRun, Argv: cmd.Argv, Env: cmd.Env, Stdin: cmd.Stdin,
		TimeoutMS: timeout.Milliseconds(), MaxOutput: min(limit, maxOutput)}
	if len(cmd.Stdin) > maxChunk/2 {
		req.Stdin, req.StdinFile = nil, "/tmp/.klatch-lab-stdin-"+c.newID()
		if err := c.put(ctx, req.StdinFile, 0o600, cmd.Stdin); err != nil {
			return lab.Result{}, err
		}
	}
	res, err := c.call(ctx, req, timeout+grace)
	if err != nil {
		return lab.Result{}, fmt.Errorf("run %q in guest: %w", cmd.Argv[0], err)
	}
	return lab.Result{Exit: res.Exit, Stdout: res.Stdout, Stderr: res.Stderr, Truncated: res.Truncated,
		TimedOut: res.TimedOut, Took: time.Duration(res.TookMS) * time.Millisecond}, nil
}

// Put writes a file in the guest. The line carries about 100 kB a second in
// an emulated machine; larger things belong into lab.Spec.Files.
func (c *Client) Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error {
	all, err := io.ReadAll(io.LimitReader(content, maxPut+1))
	if err != nil {
		return fmt.Errorf("read content for %s: %w", path, err)
	}
	if len(all) > maxPut {
		return fmt.Errorf("put %s into guest: more than %d bytes", path, maxPut)
	}
	return c.put(ctx, path, mode, all)
}

// maxPut bounds Put: at the line's speed this takes minutes.
const maxPut = 64 << 20

// Reboot asks the guest to restart; it returns when the agent agreed.
func (c *Client) Reboot(ctx context.Context) error {
	_, err := c.call(ctx, request{Op: opReboot}, grace)
	if errors.Is(err, lab.ErrGuestRebooted) {
		return nil // faster than its answer
	}
	return err
}

func (c *Client) put(ctx context.Context, path string, mode fs.FileMode, content []byte) error {
	sum := sha256.Sum256(content)
	for offset := 0; ; {
		end := min(offset+maxChunk, len(content))
		req := request{Op: opPut, Path: path, Offset: int64(offset), Data: content[offset:end]}
		if end == len(content) {
			req.Last, req.Mode, req.SHA256 = true, uint32(mode.Perm()), hex.EncodeToString(sum[:])
		}
		if _, err := c.call(ctx, req, grace); err != nil {
			return fmt.Errorf("put %s into guest: %w", path, err)
		}
		if req.Last {
			return nil
		}
		offset = end
	}
}

// call sends a request and waits for its response.
func (c *Client) call(ctx context.Context, req request, limit time.Duration) (response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go c.patience(ctx, cancel, limit)
	// What is said to a guest that still boots is lost.
	if _, err := c.Await(ctx, ""); err != nil {
		return response{}, err
	}
	req.ID = c.newID()
	answer := make(chan response, 1)
	c.mu.Lock()
	if c.closed != nil {
		c.mu.Unlock()
		return response{}, c.closed
	}
	c.waiting[req.ID] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, req.ID)
		c.mu.Unlock()
	}()

	sent := make(chan error, 1)
	go func() { sent <- c.send(req) }() // a stopped emulator takes no bytes; ctx must still end the call
	for {
		select {
		case err := <-sent:
			if err != nil {
				return response{}, err
			}
			sent = nil
		case res, ok := <-answer:
			switch {
			case !ok:
				return response{}, c.why()
			case res.Error != "":
				return response{}, fmt.Errorf("guest agent: %s", res.Error)
			}
			return res, nil
		case <-ctx.Done():
			return response{}, context.Cause(ctx)
		}
	}
}

// patience ends a wait at its limit, or when a long answer stops coming.
func (c *Client) patience(ctx context.Context, cancel context.CancelCauseFunc, limit time.Duration) {
	began := time.Now()
	t := time.NewTimer(limit)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			if now.Sub(time.Unix(0, c.coming.Load())) > longPause || now.Sub(began) > limit+maxPatience {
				cancel(fmt.Errorf("guest did not answer within %v", limit))
				return
			}
			t.Reset(time.Second)
		}
	}
}

func (c *Client) newID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nextID++
	return strconv.Itoa(c.nextID)
}

// why explains to a caller whose request was given up.
func (c *Client) why() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed != nil {
		return c.closed
	}
	return c.lost
}

func (c *Client) send(req request) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	if err := writeLine(c.line, req); err != nil {
		return fmt.Errorf("write to guest: %w", err)
	}
	return nil
}

func (c *Client) read() {
	r := bufio.NewReaderSize(&longLines{in: c.line, coming: &c.coming}, 64<<10)
	for {
		var res response
		switch err := readLine(r, maxResponse, &res); {
		case errors.Is(err, errNoise):
			continue
		case err != nil:
			c.mu.Lock()
			c.closed = ErrLineClosed
			c.giveUp()
			c.mu.Unlock()
			return
		}
		c.mu.Lock()
		if h := res.Hello; h != nil && h.Start != c.hello.Start {
			// Another agent than before: what the old one was asked is lost.
			// Hellos answer pings only, which nobody waits for by id.
			c.lost = lab.ErrGuestRebooted
			if h.BootID == c.hello.BootID {
				c.lost = errAgentRestarted
			}
			c.giveUp()
			c.hello = *h
		}
		if answer, ok := c.waiting[res.ID]; ok && res.ID != "" {
			delete(c.waiting, res.ID)
			answer <- res
		}
		c.mu.Unlock()
	}
}

// giveUp fails everybody who waits, except those who await a hello; they
// look again. The caller holds mu.
func (c *Client) giveUp() {
	for id, answer := range c.waiting {
		delete(c.waiting, id)
		close(answer)
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// longLines notes when a part of a long line comes.
type longLines struct {
	in     io.Reader
	length int
	coming *atomic.Int64
}

func (l *longLines) Read(p []byte) (int, error) {
	n, err := l.in.Read(p)
	if end := bytes.LastIndexByte(p[:n], '\n'); end >= 0 {
		l.length = n - end - 1
	} else {
		l.length += n
	}
	if l.length > longAnswer {
		l.coming.Store(time.Now().UnixNano())
	}
	return n, err
}
