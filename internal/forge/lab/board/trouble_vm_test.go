// SPDX-License-Identifier: Apache-2.0

//go:build vm

package board_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/board"
	"klatch/internal/forge/lab/labtest"
)

// adapter is a serial adapter between the rig and the board. It can be cut,
// and can make noise of its own in both directions.
type adapter struct {
	socket string
	board  string
	noise  func([]byte) []byte

	mu    sync.Mutex
	cut   bool
	conns []net.Conn
}

func newAdapter(t *testing.T, e *emulated) *adapter {
	t.Helper()
	a := &adapter{socket: filepath.Join(t.TempDir(), "adapter.sock"), board: e.socket}
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); a.pull() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go a.serve(c)
		}
	}()
	return a
}

// serve joins the rig with the board, over restarts of the board.
func (a *adapter) serve(rig net.Conn) {
	defer rig.Close()
	for a.keep(rig) {
		b, err := net.Dial("unix", a.board)
		if err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		if !a.keep(b) {
			return
		}
		go a.carry(b, rig)
		a.carry(rig, b)
		_ = b.Close()
	}
}

func (a *adapter) carry(to, from net.Conn) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		out := bytes.Clone(buf[:n])
		if a.noise != nil && n > 0 {
			out = a.noise(out)
		}
		if _, werr := to.Write(out); err != nil || werr != nil {
			return
		}
	}
}

func (a *adapter) keep(c net.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cut {
		_ = c.Close()
		return false
	}
	a.conns = append(a.conns, c)
	return true
}

// pull cuts the line for good.
func (a *adapter) pull() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cut = true
	for _, c := range a.conns {
		_ = c.Close()
	}
}

func through(a *adapter) func(*board.File) {
	return func(f *board.File) { f.Line.Socket = a.socket }
}

// TestNoiseOnTheLine: bytes are lost, changed and added while the kernel
// prints and files and answers go over the line. Nothing of it arrives wrong.
func TestNoiseOnTheLine(t *testing.T) {
	e := newBoard(t)
	a := newAdapter(t, e)
	var damaged atomic.Int64
	a.noise = func(p []byte) []byte {
		at := rand.N(len(p))
		if p[at] < 0x80 {
			return p // a letter of the kernel that is lost is lost for ever
		}
		switch rand.N(1000) {
		case 0:
			p = slices.Delete(p, at, at+1)
		case 1:
			p[at] = 0x80 | byte(rand.N(128))
		case 2:
			p = slices.Insert(p, at, 0xff, 0x85, 0xc0, 0xc1, 0xfe)
		default:
			return p
		}
		damaged.Add(1)
		return p
	}
	m := boot(t, e.rig(t, through(a)), spec())
	const lines = 150
	flood := make(chan error, 1)
	go func() {
		_, err := m.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c",
			fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo \"flood line $i ends here\" > /dev/kmsg; i=$((i+1)); done", lines)}, Timeout: 2 * time.Minute})
		flood <- err
	}()
	content := bytes.Repeat([]byte{0, 0xc0, 0xc1, '\n', 0xff, 0x80}, 2_000)
	if err := m.Put(t.Context(), "/tmp/noisy", 0o644, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	res, err := m.Run(t.Context(), lab.Command{Argv: []string{"cat", "/tmp/noisy"}})
	if err != nil || !bytes.Equal(res.Stdout, content) {
		t.Errorf("%d bytes came back, want %d, %v", len(res.Stdout), len(content), err)
	}
	if err := <-flood; err != nil {
		t.Error(err)
	}
	text, err := m.Console()
	if err != nil {
		t.Fatal(err)
	}
	whole := 0
	for line := range strings.Lines(text) {
		if i := strings.Index(line, "] flood line "); i > 0 && line[0] == '[' && strings.HasSuffix(line, " ends here\n") {
			whole++
		}
	}
	t.Logf("the line was disturbed %d times", damaged.Load())
	if damaged.Load() == 0 {
		t.Error("never: the test shows nothing")
	}
	if whole != lines {
		t.Errorf("%d of %d lines of the kernel are whole", whole, lines)
	}
	if v, troubles := lab.Judge(nil, text); v != lab.Pass {
		t.Errorf("verdict %s: %+v", v, troubles)
	}
}

// TestBrokenBoard: none of this is ever the livepatch's fault, or a pass.
func TestBrokenBoard(t *testing.T) {
	bootOnly := func(rig lab.Rig, s lab.Spec) func(context.Context, lab.Rig) error {
		return func(ctx context.Context, _ lab.Rig) error {
			m, err := rig.Boot(ctx, s)
			if err == nil {
				_ = m.Close()
			}
			return err
		}
	}
	e := newBoard(t)
	a := newAdapter(t, e)
	silent, mute := newBoard(t), newBoard(t)
	silent.write(t, "words", "console=tty0 klatch.line=/dev/ttyS0")
	mute.write(t, "words", "console=ttyS0,115200 rdinit=/bin/busybox")
	other := spec()
	other.Kernel = patched(t)
	labtest.RunBroken(t, e.rig(t, nil), map[string]func(context.Context, lab.Rig) error{
		"the board runs another kernel":         bootOnly(e.rig(t, nil), other),
		"what the kernel prints goes elsewhere": bootOnly(silent.rig(t, nil), spec()),
		"the agent does not come up":            bootOnly(mute.rig(t, func(f *board.File) { f.BootSeconds = 10 }), spec()),
		"the line is cut under a command": func(ctx context.Context, _ lab.Rig) error {
			m, err := e.rig(t, through(a)).Boot(ctx, spec())
			if err != nil {
				t.Error(err)
				return err
			}
			defer m.Close()
			time.AfterFunc(time.Second, a.pull)
			_, err = m.Run(ctx, lab.Command{Argv: []string{"sleep", "100"}})
			return err
		},
		"the power switch is that of another board": func(ctx context.Context, _ lab.Rig) error {
			e.switchPower(t, "on")
			one := 1
			rig := e.rig(t, func(f *board.File) { f.Power.Off, f.Power.OffSeconds = []string{"true"}, &one })
			if err := speaks(e.socket); err != nil {
				t.Error(err)
			}
			_, err := rig.Boot(ctx, spec())
			e.switchPower(t, "off")
			return err
		},
	})
}

// speaks returns when the agent is heard on a line.
func speaks(socket string) error {
	for range 600 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		buf := make([]byte, 4096)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			if bytes.IndexByte(buf[:n], 0xc1) >= 0 {
				return nil
			}
		}
	}
	return fmt.Errorf("%s does not come up", socket)
}
