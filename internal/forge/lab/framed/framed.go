// SPDX-License-Identifier: Apache-2.0

// Package framed carries a reliable stream of bytes over a serial line that a
// kernel's console uses too, and keeps the two apart. It owns the frames, the
// repeats and the silence; what the stream says is none of its business.
//
// Start with Link. One end is the beacon: it speaks first, and once a second
// while it hears nothing. The other end answers and never speaks to a line on
// which it has not heard the beacon in the last two seconds: a boot loader or
// a firmware that waits for a key must not get one from us.
package framed

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"sync"
	"time"
)

const (
	// window is how many data frames may be under way: 8 kB, a second at
	// 115200 baud, and less than the kernel's terminal layer can keep.
	window = 32
	// queueLimit is how many data frames may wait, those under way included.
	queueLimit = 2 * window
	// inLimit is how much the reader may be late before the other end waits.
	inLimit = 1 << 20

	tick       = 100 * time.Millisecond
	beaconTime = time.Second
	silence    = 2 * time.Second
	repeatMin  = 1500 * time.Millisecond
	repeatMax  = 12 * time.Second
)

// Link is one end. Read and Write may be called concurrently with each other
// and with all other methods.
//
// When the other end starts anew, what was under way in either direction is
// lost, and the reader gets a newline in its place.
type Link struct {
	line    io.ReadWriteCloser
	console io.Writer
	beacon  bool
	me      uint32
	done    chan struct{} // closed when the link is

	mu      sync.Mutex
	changed *sync.Cond // of everything below
	closed  error
	peer    uint32 // 0 while unknown
	life    int    // counts the peers
	heard   time.Time

	queue    []frame // data frames that are not acknowledged
	sent     int     // how many of queue were sent
	next     uint32  // number of the next data frame
	repeat   time.Duration
	progress time.Time // when the peer last acknowledged, or we began to wait
	resent   uint32    // the frame for which a nack was obeyed last
	resentOK bool

	in    bytes.Buffer
	want  uint32 // number of the data frame that comes next
	reply byte   // kind of the frame without data that must go out; 0 is none
	spoke time.Time
}

// NewBeacon makes the end inside of a machine. What is written before the
// other end is there waits for it. Bytes that are no frames are dropped.
func NewBeacon(line io.ReadWriteCloser) *Link { return start(line, io.Discard, true) }

// New makes the end outside. What is written while nobody is there is lost.
// The console gets all bytes that are no frames.
func New(line io.ReadWriteCloser, console io.Writer) *Link { return start(line, console, false) }

func start(line io.ReadWriteCloser, console io.Writer, beacon bool) *Link {
	var id [4]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	l := &Link{line: line, console: console, beacon: beacon, me: binary.BigEndian.Uint32(id[:]) | 1,
		done: make(chan struct{}), repeat: repeatMin}
	l.changed = sync.NewCond(&l.mu)
	go l.read()
	go l.pump()
	go l.ticks()
	return l
}

// Read implements io.Reader.
func (l *Link) Read(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.in.Len() == 0 {
		if l.closed != nil {
			return 0, l.closed
		}
		l.changed.Wait()
	}
	return l.in.Read(p)
}

// Write implements io.Writer. It returns when the last byte has a place in
// the queue, not when it has arrived.
func (l *Link) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	life := l.life
	for part := range slices.Chunk(p, maxPayload) {
		for len(l.queue) >= queueLimit && l.closed == nil && l.life == life {
			l.changed.Wait()
		}
		switch {
		case l.closed != nil:
			return 0, l.closed
		case l.life != life, l.peer == 0 && !l.beacon:
			return len(p), nil // lost: nobody is there, or another one
		}
		l.queue = append(l.queue, frame{kind: kindData, seq: l.next, payload: bytes.Clone(part)})
		l.next++
		l.changed.Broadcast()
	}
	return len(p), nil
}

// Close ends the link and its line. It may be called twice.
func (l *Link) Close() error {
	l.fail(io.ErrClosedPipe)
	return l.line.Close()
}

// Heard is when the last whole frame of the other end came; zero is never.
func (l *Link) Heard() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.heard
}

// Forget takes the other end for gone: its power is off. Nothing is sent
// until a beacon is heard again.
func (l *Link) Forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.meet(0)
	l.heard = time.Time{}
}

func (l *Link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed == nil {
		l.closed = err
		close(l.done)
	}
	l.changed.Broadcast()
}

func (l *Link) read() {
	var s splitter
	buf := make([]byte, 8<<10)
	for {
		n, err := l.line.Read(buf)
		if text := s.split(buf[:n], l.take); len(text) > 0 {
			_, _ = l.console.Write(text) // the console remembers its own errors
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.EOF
			}
			l.fail(err)
			return
		}
	}
}

// take obeys one frame.
func (l *Link) take(f frame) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.changed.Broadcast()
	if f.src == l.me || f.src == 0 {
		return // our own: the other side echoes, it is not set up yet
	}
	l.heard = time.Now()
	if f.src != l.peer {
		l.meet(f.src)
	}
	if f.dst != l.me {
		l.reply = kindSync // it does not know us, or knows our predecessor
		return
	}
	l.acknowledged(f.ack)
	switch f.kind {
	case kindSync:
		l.reply = max(l.reply, kindAck)
		if l.sent > 0 && time.Since(l.spoke) > beaconTime/2 {
			l.sent = 0 // it waits, and so do we: something was lost
		}
	case kindNack:
		if len(l.queue) > 0 && (!l.resentOK || l.resent != l.queue[0].seq) {
			l.resent, l.resentOK = l.queue[0].seq, true
			l.sent = 0
		}
	case kindData:
		switch {
		case f.seq == l.want && l.in.Len() < inLimit:
			l.in.Write(f.payload)
			l.want++
			l.reply = max(l.reply, kindAck)
		case f.seq > l.want:
			l.reply = max(l.reply, kindNack)
		default:
			l.reply = max(l.reply, kindAck)
		}
	}
}

// meet begins anew with another peer.
func (l *Link) meet(peer uint32) {
	known := l.peer != 0
	l.peer = peer
	if known || !l.beacon { // a beacon's first words wait for its first peer
		l.queue, l.next = nil, 0
		l.life++
	}
	if l.want > 0 {
		l.in.WriteByte('\n') // ends what was cut in the middle
	}
	l.sent, l.want, l.reply, l.resentOK, l.repeat = 0, 0, 0, false, repeatMin
	l.changed.Broadcast()
}

func (l *Link) acknowledged(ack uint32) {
	for len(l.queue) > 0 && l.sent > 0 && l.queue[0].seq < ack {
		l.queue = l.queue[1:]
		l.sent--
		l.repeat, l.progress = repeatMin, time.Now()
	}
	// After a repeat began: what it repeats may have arrived after all.
	for len(l.queue) > 0 && l.queue[0].seq < ack && ack <= l.next {
		l.queue = l.queue[1:]
		l.progress = time.Now()
	}
}

// pump sends, and is the only one that does.
func (l *Link) pump() {
	var out []byte
	for {
		f, ok := l.pick()
		if !ok {
			return
		}
		out = f.encode(out[:0])
		if _, err := l.line.Write(out); err != nil {
			l.fail(err)
			return
		}
	}
}

// pick waits for a frame that may go out.
func (l *Link) pick() (frame, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		f := frame{src: l.me, dst: l.peer, ack: l.want}
		switch {
		case l.closed != nil:
			return frame{}, false
		case !l.beacon && time.Since(l.heard) > silence:
		case l.reply != 0 && l.reply != kindAck:
			f.kind, l.reply = l.reply, 0
			l.spoke = time.Now()
			return f, true
		case l.peer != 0 && l.sent < len(l.queue) && l.sent < window:
			d := l.queue[l.sent]
			f.kind, f.seq, f.payload = d.kind, d.seq, d.payload
			if l.sent == 0 {
				l.progress = time.Now()
			}
			l.sent++
			l.reply = 0
			l.spoke = time.Now()
			return f, true
		case l.reply != 0:
			f.kind, l.reply = l.reply, 0
			l.spoke = time.Now()
			return f, true
		}
		l.changed.Wait()
	}
}

// ticks repeats what was not acknowledged in time, and is the beacon's clock.
func (l *Link) ticks() {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-l.done:
			return
		case now := <-t.C:
			l.mu.Lock()
			if l.sent > 0 && now.Sub(l.progress) > l.repeat {
				l.sent, l.progress = 0, now
				l.repeat = min(2*l.repeat, repeatMax)
			}
			if l.beacon && now.Sub(l.heard) > beaconTime && now.Sub(l.spoke) > beaconTime {
				l.reply = kindSync
			}
			l.changed.Broadcast()
			l.mu.Unlock()
		}
	}
}
