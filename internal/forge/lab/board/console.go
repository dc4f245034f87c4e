// SPDX-License-Identifier: Apache-2.0

package board

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"klatch/internal/forge/lab"
)

const (
	// maxConsole bounds what Console reads; the end is kept.
	maxConsole = 16 << 20
	// maxConsoleFile bounds the file: a board that prints for ever must not
	// fill the publisher's disk. What comes after is not seen, so that the
	// console is broken then.
	maxConsoleFile = 256 << 20
	// markLimit is what a mark may take from the kernel to us.
	markLimit = 15 * time.Second
)

// console is all text of the kernel since Boot, in a file without a name.
type console struct {
	mu      sync.Mutex
	file    *os.File
	size    int64
	err     error // why text was lost
	changed chan struct{}
}

func newConsole(dir string) (*console, error) {
	f, err := os.CreateTemp(dir, "board-console-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &console{file: f, changed: make(chan struct{})}, nil
}

// Write implements io.Writer. It never fails: what is lost is remembered.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
	case c.size+int64(len(p)) > maxConsoleFile:
		c.err = fmt.Errorf("the board printed more than %d bytes", maxConsoleFile)
	default:
		n, err := c.file.WriteAt(p, c.size)
		c.size += int64(n)
		c.err = err
	}
	close(c.changed)
	c.changed = make(chan struct{})
	return len(p), nil
}

// text is what was printed, at most the last maxConsole bytes.
func (c *console) text() ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	skip := max(0, c.size-maxConsole)
	return io.ReadAll(io.NewSectionReader(c.file, skip, c.size-skip))
}

// await waits until the text stands on the console after the given place.
func (c *console) await(ctx context.Context, text string, after int64) error {
	for {
		c.mu.Lock()
		changed, err, size := c.changed, c.err, c.size
		part := make([]byte, min(size-after, maxConsole))
		if err == nil && len(part) > 0 {
			_, err = c.file.ReadAt(part, size-int64(len(part)))
		}
		c.mu.Unlock()
		switch {
		case err != nil:
			return err
		case bytes.Contains(part, []byte(text)):
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *console) place() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size
}

func (c *console) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = os.ErrClosed
	}
	return c.file.Close()
}

// mark makes the kernel print a line and waits until it is here: what was
// printed before is here then, too.
func (m *machine) mark(ctx context.Context) error {
	mark := "klatch-board: mark " + rand.Text()
	place := m.console.place()
	if _, err := m.sh(ctx, "echo '"+mark+"' > /dev/kmsg"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, markLimit, fmt.Errorf("not within %v", markLimit))
	defer cancel()
	if err := m.console.await(ctx, mark, place); err != nil {
		return fmt.Errorf("what the kernel prints does not arrive here, so that trouble would not be seen: %w; "+
			"its command line must name this line as a console, and the cable must be in", err)
	}
	return nil
}

// Console implements lab.Machine. With a console line of its own, the board is
// asked to print a mark first: an answer may be faster than the console.
func (m *machine) Console() (string, error) {
	if m.consoleLine != nil && m.running() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*markLimit)
		defer cancel()
		before := m.client.Hello()
		if err := m.mark(ctx); err != nil && m.client.Hello() == before && time.Since(m.link.Heard()) < 2*time.Second {
			return "", lab.Brokenf(err, "read console of %s", m.name())
		}
	}
	raw, err := m.console.text()
	if err != nil {
		return "", lab.Brokenf(err, "read console of %s", m.name())
	}
	return lab.CleanConsole(raw), nil
}

// copyConsole keeps what comes over a console line of its own. The line ends
// with Close only.
func (m *machine) copyConsole() {
	buf := make([]byte, 8<<10)
	for {
		n, err := m.consoleLine.Read(buf)
		if n > 0 {
			_, _ = m.console.Write(buf[:n]) // remembers its errors
		}
		if err != nil {
			return
		}
	}
}
