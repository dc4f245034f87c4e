// SPDX-License-Identifier: Apache-2.0

package framed

import (
	"encoding/binary"
	"hash/crc32"
)

// On the line a frame is the byte 0xC0, its content with six bits in each
// byte from 0x80 to 0xBF, and the byte 0xC1. Text of a console is below 0x80.
// So every single byte says to whom it belongs, and a kernel that prints into
// the middle of a frame damages neither the frame nor its own line. 0xFF is
// not used because of telnet and PARMRK.
const (
	begin   = 0xC0
	end     = 0xC1
	symbols = 0x80 // the first of 64
)

// frame is what goes over the line at once.
type frame struct {
	kind     byte
	src, dst uint32 // sessions of the two ends; dst is 0 while unknown
	seq      uint32 // of a data frame
	ack      uint32 // the next data frame that the sender wants
	payload  []byte
}

// Kinds of frames.
const (
	kindSync = 'S' // "I am here"; the other end answers
	kindData = 'D'
	kindAck  = 'A'
	kindNack = 'N' // an ack that says: something is missing, send again
)

const (
	headSize   = 1 + 4*4
	sumSize    = 4
	maxPayload = 240
	maxSymbols = ((headSize+maxPayload+sumSize)*8 + 5) / 6
)

// encode appends the frame as it goes over the line.
func (f frame) encode(to []byte) []byte {
	raw := make([]byte, 0, headSize+len(f.payload)+sumSize)
	raw = append(raw, f.kind)
	for _, n := range []uint32{f.src, f.dst, f.seq, f.ack} {
		raw = binary.BigEndian.AppendUint32(raw, n)
	}
	raw = append(raw, f.payload...)
	raw = binary.BigEndian.AppendUint32(raw, crc32.ChecksumIEEE(raw))
	to = append(to, begin)
	var bits, n uint
	for _, b := range raw {
		bits, n = bits<<8|uint(b), n+8
		for n >= 6 {
			n -= 6
			to = append(to, symbols|byte(bits>>n&0x3F))
		}
	}
	if n > 0 {
		to = append(to, symbols|byte(bits<<(6-n)&0x3F))
	}
	return append(to, end)
}

// decode reads the content of a frame; false means that it was damaged.
func decode(content []byte) (frame, bool) {
	raw := make([]byte, 0, len(content)*6/8)
	var bits, n uint
	for _, b := range content {
		bits, n = bits<<6|uint(b&0x3F), n+6
		if n >= 8 {
			n -= 8
			raw = append(raw, byte(bits>>n&0xFF))
		}
	}
	size := len(raw) - sumSize
	if size < headSize || size > headSize+maxPayload || binary.BigEndian.Uint32(raw[size:]) != crc32.ChecksumIEEE(raw[:size]) {
		return frame{}, false
	}
	word := func(i int) uint32 { return binary.BigEndian.Uint32(raw[1+4*i:]) }
	f := frame{kind: raw[0], src: word(0), dst: word(1), seq: word(2), ack: word(3), payload: raw[headSize:size]}
	switch f.kind {
	case kindSync, kindAck, kindNack:
		return f, len(f.payload) == 0
	case kindData:
		return f, true
	default:
		return frame{}, false
	}
}

// splitter takes what comes over the line apart: frames and console.
type splitter struct {
	inside  bool
	content []byte // of the frame that is coming
}

// split gives each whole frame to take, and returns the bytes of the console
// in their order.
//
// What is neither, the rest of a damaged frame or a letter outside of ASCII,
// is dropped: in front of a kernel's line it would keep the detector from
// knowing the line, and a trouble from being seen.
func (s *splitter) split(in []byte, take func(frame)) (console []byte) {
	for _, b := range in {
		switch {
		case b < symbols:
			console = append(console, b)
		case b == begin:
			s.inside, s.content = true, s.content[:0]
		case b == end:
			if s.inside {
				if f, ok := decode(s.content); ok {
					take(f)
				}
			}
			s.inside, s.content = false, s.content[:0]
		case b < begin && s.inside:
			if len(s.content) == maxSymbols { // its end was lost
				s.inside = false
				continue
			}
			s.content = append(s.content, b)
		}
	}
	return console
}
