// SPDX-License-Identifier: Apache-2.0

package board

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"klatch/internal/forge/lab/guest"
)

const (
	// reopenEvery is how long to wait before a line is tried again.
	reopenEvery = 500 * time.Millisecond
	// firstByte is what a program may take to bring the agent's first word,
	// which says one every second; nextByte is how long it may be silent
	// later. ssh itself would not notice for minutes that the board is gone.
	firstByte = 10 * time.Second
	nextByte  = time.Minute
)

// line is one way to the board. It comes back by itself: an adapter that is
// fed by the board is gone while the board is off, and ssh ends with each
// restart. What is written meanwhile is lost, as on any serial line.
type line struct {
	open func() (io.ReadWriteCloser, error)
	name string

	program bool // the line is a program, which is started again when it is silent

	mu     sync.Mutex
	now    io.ReadWriteCloser
	came   time.Time     // when something came last
	limit  time.Duration // for the silence after it
	closed bool
	done   chan struct{}
	since  time.Time // since when it is down; zero is up
	before time.Time // since when it was, before it came up
	why    error
	later  time.Time // not opened before
}

func newLine(c Line) *line {
	l := &line{done: make(chan struct{}), since: time.Now(), why: errors.New("not opened yet")}
	switch {
	case c.Serial != "":
		l.name = c.Serial
		l.open = func() (io.ReadWriteCloser, error) { return openSerial(c.Serial, c.Speed) }
	case c.Socket != "":
		l.name = c.Socket
		l.open = func() (io.ReadWriteCloser, error) { return openSocket(c.Socket) }
	default:
		l.name, l.program = c.Command[0], true
		l.open = func() (io.ReadWriteCloser, error) { return startCommand(c.Command) }
	}
	return l
}

// Read implements io.Reader; it ends only with Close.
func (l *line) Read(p []byte) (int, error) {
	for {
		c, err := l.current()
		if err != nil {
			return 0, err
		}
		if c == nil { // also a program that ends at once must not be started all the time
			select {
			case <-l.done:
			case <-time.After(reopenEvery):
			}
			continue
		}
		n, err := c.Read(p)
		if err != nil {
			l.drop(c, err)
		}
		if n > 0 {
			l.mu.Lock()
			l.came, l.limit = time.Now(), nextByte
			l.mu.Unlock()
			return n, nil
		}
	}
}

// current opens the line if it is not; nil without an error means: later.
func (l *line) current() (io.ReadWriteCloser, error) {
	l.mu.Lock()
	c, closed, later := l.now, l.closed, l.later
	l.mu.Unlock()
	switch {
	case closed:
		return nil, io.EOF
	case c != nil || time.Now().Before(later):
		return c, nil
	}
	c, err := l.open() // without the lock: only the reader opens
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.why = err
		return nil, nil
	case l.closed:
		return nil, errors.Join(io.EOF, c.Close())
	}
	l.now, l.before, l.since, l.why = c, l.since, time.Time{}, nil
	l.came, l.limit = time.Now(), firstByte
	if l.program {
		go l.watch(c)
	}
	return c, nil
}

// watch ends a program that brings nothing.
func (l *line) watch(c io.ReadWriteCloser) {
	t := time.NewTicker(reopenEvery)
	defer t.Stop()
	for {
		select {
		case <-l.done:
			return
		case now := <-t.C:
			l.mu.Lock()
			gone, silent, limit := l.now != c, now.Sub(l.came), l.limit
			l.mu.Unlock()
			switch {
			case gone:
				return
			case silent > limit:
				l.drop(c, fmt.Errorf("nothing came for %v", limit))
			}
		}
	}
}

// renew starts a program again: its board has gone.
func (l *line) renew() {
	l.mu.Lock()
	c := l.now
	l.mu.Unlock()
	if l.program && c != nil {
		l.drop(c, errors.New("the board's power was off"))
	}
}

func (l *line) drop(c io.Closer, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now != c {
		return
	}
	if cerr := c.Close(); cerr != nil { // a command says here why it ended
		err = fmt.Errorf("%w: %w", err, cerr)
	}
	l.now, l.since, l.why = nil, time.Now(), err
	l.later = l.since.Add(reopenEvery)
	if l.limit == firstByte { // it came up and brought nothing: it is down still
		l.since = l.before
	}
}

// Write implements io.Writer.
func (l *line) Write(p []byte) (int, error) {
	l.mu.Lock()
	c, closed := l.now, l.closed
	l.mu.Unlock()
	if closed {
		return 0, io.ErrClosedPipe
	}
	if c != nil {
		if _, err := c.Write(p); err != nil {
			l.drop(c, err)
		}
	}
	return len(p), nil
}

// Close implements io.Closer.
func (l *line) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.done)
	if l.now == nil {
		return nil
	}
	c := l.now
	l.now = nil
	_ = c.Close() // a command is killed, and says so
	return nil
}

// down says since when the line is not there, and why; a zero time says that
// it is.
func (l *line) down() (since time.Time, why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.since, l.why
}

func openSocket(path string) (io.ReadWriteCloser, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	return d.DialContext(context.Background(), "unix", path)
}

// openSerial opens a terminal for us alone, as far as the kernel can see to
// that: root is not stopped.
func openSerial(name string, speed int) (io.ReadWriteCloser, error) {
	f, err := guest.OpenTerminal(name, speed)
	if err != nil {
		return nil, err
	}
	if err := guest.Exclusive(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// program is a line made of a program's standard input and output.
type program struct {
	out    *os.File
	in     io.WriteCloser
	cmd    *exec.Cmd
	stderr *lastWords
	once   sync.Once
	err    error
}

func startCommand(argv []string) (io.ReadWriteCloser, error) {
	cmd := exec.Command(argv[0], argv[1:]...) //nolint:noctx // Close ends it
	// Its own group, so that Close ends its children too; and its end with ours.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p := &program{cmd: cmd, stderr: &lastWords{}}
	var err error
	if p.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, outTheirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.out = out
	cmd.Stdout, cmd.Stderr = outTheirs, p.stderr
	cmd.WaitDelay = time.Second
	err = cmd.Start()
	_ = outTheirs.Close()
	if err != nil {
		return nil, errors.Join(err, out.Close())
	}
	return p, nil
}

func (p *program) Read(b []byte) (int, error) { return p.out.Read(b) }

func (p *program) Write(b []byte) (int, error) { return p.in.Write(b) }

// Close ends the program and says how it went.
func (p *program) Close() error {
	p.once.Do(func() {
		_ = p.in.Close()
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		err := p.cmd.Wait()
		_ = p.out.Close()
		if text := p.stderr.String(); text != "" {
			p.err = fmt.Errorf("%s: %w: %s", p.cmd.Args[0], err, text)
		}
	})
	return p.err
}

// lastWords keeps the end of what a program prints.
type lastWords struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const maxLastWords = 2 << 10

func (w *lastWords) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf.Write(p)
	if over := w.buf.Len() - maxLastWords; over > 0 {
		w.buf.Next(over)
	}
	return len(p), nil
}

func (w *lastWords) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.TrimSpace(strings.ToValidUTF8(w.buf.String(), "?"))
}

// powerCommand runs one of the power commands to its end.
func powerCommand(ctx context.Context, argv []string, limit time.Duration, board string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("did not end within %v", limit))
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	said := &lastWords{}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.Env = append(os.Environ(), "KLATCH_BOARD="+board)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // what it left in the background may keep our pipe
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.Is(err, exec.ErrWaitDelay):
		err = nil // it ended well and left something running
	}
	if err != nil {
		return fmt.Errorf("power command %q: %w: %s", argv, err, said)
	}
	return nil
}
