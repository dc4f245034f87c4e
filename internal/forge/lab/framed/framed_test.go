// SPDX-License-Identifier: Apache-2.0

package framed

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// cable joins two ends; each direction can be disturbed.
type cable struct {
	net.Conn
	disturb func([]byte) []byte // what arrives instead
}

func (c cable) Write(p []byte) (int, error) {
	if c.disturb != nil {
		if _, err := c.Conn.Write(c.disturb(bytes.Clone(p))); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// screen is a console for tests.
type screen struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func ends(t *testing.T, toOutside, toInside func([]byte) []byte) (inside, outside *Link, console *screen) {
	t.Helper()
	a, b := net.Pipe()
	console = &screen{}
	inside, outside = NewBeacon(cable{a, toOutside}), New(cable{b, toInside}, console)
	t.Cleanup(func() { _ = inside.Close(); _ = outside.Close() })
	return inside, outside, console
}

// talk says hello, and echoes what comes.
func talk(inside *Link) {
	_, _ = io.WriteString(inside, "hello\n")
	_, _ = io.Copy(inside, inside)
}

func conversation(t *testing.T, inside, outside *Link, size int) {
	t.Helper()
	go talk(inside)
	r := bufio.NewReader(outside)
	if got, err := r.ReadString('\n'); err != nil || got != "hello\n" {
		t.Fatalf("first words %q, %v", got, err)
	}
	sent := make([]byte, size)
	for i := range sent {
		sent[i] = byte(rand.N(256))
	}
	go func() { _, _ = outside.Write(sent) }()
	got := make([]byte, size)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back changed, %v", size, err)
	}
}

func TestAStreamGoesBothWays(t *testing.T) {
	inside, outside, console := ends(t, nil, nil)
	conversation(t, inside, outside, 300_000)
	if console.String() != "" {
		t.Errorf("frames on the console: %q", console.String())
	}
}

func TestAKernelThatPrintsIntoFramesDamagesNeitherSide(t *testing.T) {
	const oops = "[   12.345678] BUG: kernel NULL pointer dereference, address: 0000000000000008\r\n"
	printed, seen := 0, 0
	into := func(p []byte) []byte {
		if p[1]&0xC0 == symbols && rand.N(8) == 0 {
			at := rand.N(len(p))
			p = slices.Insert(p, at, []byte(oops)...)
			printed++
		}
		return p
	}
	inside, outside, console := ends(t, into, nil)
	conversation(t, inside, outside, 100_000)
	for line := range strings.Lines(console.String()) {
		if line != oops {
			t.Fatalf("the console got %q", line)
		}
		seen++
	}
	if seen == 0 || printed-seen > 1 {
		t.Errorf("printed %d lines, seen %d", printed, seen)
	}
}

func TestLostAndChangedBytesAreSentAgain(t *testing.T) {
	damage := func(p []byte) []byte {
		switch rand.N(25) {
		case 0:
			return p[:len(p)/2]
		case 1:
			p[len(p)/3] ^= 1
		case 2:
			return slices.Delete(p, 0, 1)
		}
		return p
	}
	inside, outside, _ := ends(t, damage, damage)
	conversation(t, inside, outside, 60_000)
}

func TestNoiseBeforeTheFirstWord(t *testing.T) {
	inside, outside, console := ends(t, nil, nil)
	noise := "\xff\xfe\x00\xc0\x85\x85GRUB loading\x1b[0m\r\n\xc0\xc0\xc1\xc1" + strings.Repeat("\xc0\x90\x91", 1000) + "U-Boot 2023\n"
	if _, err := inside.line.Write([]byte(noise)); err != nil {
		t.Fatal(err)
	}
	conversation(t, inside, outside, 5_000)
	if got := console.String(); !strings.Contains(got, "GRUB loading\x1b[0m\r\n") || !strings.HasSuffix(got, "U-Boot 2023\n") {
		t.Errorf("console %q", got)
	}
}

func TestTheOutsideNeverSpeaksFirst(t *testing.T) {
	a, b := net.Pipe()
	outside := New(b, io.Discard)
	defer outside.Close()
	spoke := make(chan struct{})
	go func() { // a boot loader that waits for a key
		_, _ = a.Write([]byte("Hit any key to stop autoboot\r\n"))
		if n, _ := a.Read(make([]byte, 1)); n > 0 {
			close(spoke)
		}
	}()
	if _, err := outside.Write([]byte("ping\n")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-spoke:
		t.Error("pressed a key")
	case <-time.After(500 * time.Millisecond):
	}
}

func TestAfterForgetTheOutsideIsSilentAgain(t *testing.T) {
	inside, outside, _ := ends(t, nil, nil)
	conversation(t, inside, outside, 100)
	outside.Forget()
	if !outside.Heard().IsZero() {
		t.Error("remembers whom it heard")
	}
	outside.mu.Lock()
	left := len(outside.queue)
	outside.mu.Unlock()
	if _, err := outside.Write([]byte("lost")); err != nil || left > 0 {
		t.Errorf("%d frames left, %v", left, err)
	}
}

// Either end may start anew while the other goes on.
func TestAnEndThatStartsAnewIsMetAnew(t *testing.T) {
	for _, who := range []string{"inside", "outside"} {
		t.Run(who, func(t *testing.T) {
			line := newSwitch(t)
			inside, outside := NewBeacon(line.plug(0)), New(line.plug(1), io.Discard)
			go talk(inside)
			r := bufio.NewReader(outside)
			if got, err := r.ReadString('\n'); err != nil || got != "hello\n" {
				t.Fatalf("first words %q, %v", got, err)
			}
			want := "again\n"
			if who == "inside" {
				_, _ = io.WriteString(outside, "cut in the midd")
				_, _ = io.ReadFull(r, make([]byte, 15))
				inside = NewBeacon(line.plug(0))
				go func() { _, _ = io.WriteString(inside, want) }()
				if got, err := r.ReadString('\n'); err != nil || got != "\n" {
					t.Fatalf("in place of what was lost: %q, %v", got, err)
				}
			} else {
				outside = New(line.plug(1), io.Discard)
				r = bufio.NewReader(outside)
				go func() { // what is said before the other is heard is lost
					for range 100 {
						_, _ = io.WriteString(outside, want)
						time.Sleep(100 * time.Millisecond)
					}
				}()
			}
			for {
				got, err := r.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if got == want {
					return
				}
			}
		})
	}
}

// lineSwitch carries bytes between the two plugs that were made last.
type lineSwitch struct {
	mu  sync.Mutex
	now [2]*plug
}

type plug struct {
	s    *lineSwitch
	side int
	in   chan []byte
	rest []byte
	done chan struct{}
	once sync.Once
}

func newSwitch(t *testing.T) *lineSwitch {
	s := &lineSwitch{}
	t.Cleanup(func() {
		for _, p := range s.now {
			_ = p.Close()
		}
	})
	return s
}

func (s *lineSwitch) plug(side int) *plug {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.now[side]; old != nil {
		_ = old.Close()
	}
	s.now[side] = &plug{s: s, side: side, in: make(chan []byte, 100), done: make(chan struct{})}
	return s.now[side]
}

func (p *plug) Write(b []byte) (int, error) {
	p.s.mu.Lock()
	to := p.s.now[1-p.side]
	mine := p.s.now[p.side] == p
	p.s.mu.Unlock()
	if !mine {
		return 0, io.ErrClosedPipe
	}
	if to == nil {
		return len(b), nil
	}
	select {
	case to.in <- bytes.Clone(b):
	case <-to.done:
	}
	return len(b), nil
}

func (p *plug) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		select {
		case p.rest = <-p.in:
		case <-p.done:
			return 0, io.ErrClosedPipe
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func (p *plug) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func TestAClosedLinkEndsItsUsers(t *testing.T) {
	inside, outside, _ := ends(t, nil, nil)
	conversation(t, inside, outside, 10)
	_ = outside.Close()
	if _, err := outside.Read(make([]byte, 1)); err == nil {
		t.Error("read goes on")
	}
	if _, err := outside.Write([]byte("x")); err == nil {
		t.Error("write goes on")
	}
	if _, err := io.ReadAll(inside); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the other end: %v", err)
	}
}

func FuzzSplit(f *testing.F) {
	whole := frame{kind: kindData, src: 1, dst: 2, seq: 3, ack: 4, payload: []byte("payload")}
	f.Add([]byte("[    1.0] text\n"), 3)
	f.Add(whole.encode(nil), 9)
	f.Add([]byte("\xc0\x80\x81\xe2\x82\xac\xc1"), 0)
	f.Fuzz(func(t *testing.T, in []byte, at int) {
		// Whatever comes, text below 0x80 reaches the console, and nothing else.
		var s splitter
		var ascii []byte
		for _, b := range in {
			if b < 0x80 {
				ascii = append(ascii, b)
			}
		}
		console := s.split(in, func(f frame) {
			if len(f.payload) > maxPayload {
				t.Errorf("payload of %d bytes", len(f.payload))
			}
		})
		if !bytes.Equal(console, ascii) {
			t.Errorf("console %q, want %q", console, ascii)
		}
		if len(s.content) > maxSymbols {
			t.Errorf("keeps %d bytes", len(s.content))
		}
		// A frame that follows is read, also with that text in its middle.
		line := whole.encode(nil)
		line = slices.Insert(line, 1+max(0, at)%(len(line)-1), ascii...)
		n := 0
		s.split(line, func(f frame) {
			n++
			if f.kind != whole.kind || f.seq != whole.seq || !bytes.Equal(f.payload, whole.payload) {
				t.Errorf("got %+v", f)
			}
		})
		if n != 1 {
			t.Errorf("%d frames", n)
		}
	})
}

// Frames in any order from anybody must not make the link grow or panic.
func FuzzTake(f *testing.F) {
	f.Add([]byte("SDAN0123456789abcdef"))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, a) }()
		l := New(b, io.Discard)
		defer l.Close()
		defer a.Close()
		_, _ = l.Write([]byte("something"))
		for c := range slices.Chunk(in, 5) {
			if len(c) < 5 {
				break
			}
			dst := l.me
			if c[2]%4 == 0 {
				dst = uint32(c[2])
			}
			l.take(frame{kind: c[0], src: uint32(c[1] % 3), dst: dst, seq: uint32(c[3] % 8), ack: uint32(c[4] % 8), payload: in[:min(len(in), maxPayload)]})
			l.mu.Lock()
			if l.sent > len(l.queue) || l.sent < 0 || len(l.queue) > queueLimit {
				t.Errorf("%d of %d sent", l.sent, len(l.queue))
			}
			l.mu.Unlock()
		}
	})
}
