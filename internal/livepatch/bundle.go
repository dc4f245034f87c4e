// SPDX-License-Identifier: Apache-2.0

package livepatch

import (
	"encoding/binary"

	"klatch/internal/fault"
)

// Bundle is the file that travels (.lpb): one signed manifest, one signed
// module. Nothing in it is compressed, so no decompressor meets foreign bytes.
//
// Layout, integers big-endian:
//
//	8 bytes  "KLATCHB1"
//	then the members "manifest", "module", in this order, each
//	  1 byte   length of the name
//	  n bytes  name
//	  8 bytes  length of the content
//	  n bytes  content
//
// A reader of version 1 refuses any other member, order or trailing byte;
// evidence will be a new version, which old readers must not misread.
type Bundle struct {
	Manifest []byte // signed note, see package trust
	Module   []byte // module with its appended signature
}

const bundleMagic = "KLATCHB1"

// BundleSuffix ends the name of every bundle, and of nothing else in a
// repository.
const BundleSuffix = ".lpb"

// MaxBundle limits a bundle file, in bytes.
const MaxBundle = MaxManifest + MaxModule + 64

// Encode writes the bundle's one form.
func (b Bundle) Encode() []byte {
	out := []byte(bundleMagic)
	for _, m := range b.members() {
		out = append(out, byte(len(m.name))) //nolint:gosec // our two names are short
		out = append(out, m.name...)
		out = binary.BigEndian.AppendUint64(out, uint64(len(*m.content)))
		out = append(out, *m.content...)
	}
	return out
}

// ParseBundle reads a bundle. The result shares the input's memory.
func ParseBundle(in []byte) (Bundle, error) {
	var b Bundle
	bad := func(format string, args ...any) (Bundle, error) {
		return Bundle{}, fault.New(fault.Untrusted, "bundle_malformed", "bundle: "+format, args...)
	}
	if len(in) > MaxBundle {
		return bad("%d bytes, limit %d", len(in), MaxBundle)
	}
	if len(in) < len(bundleMagic) || string(in[:len(bundleMagic)]) != bundleMagic {
		return bad("does not begin with %s", bundleMagic)
	}
	rest := in[len(bundleMagic):]
	for _, m := range b.members() {
		head := 1 + len(m.name) + 8
		if len(rest) < head || int(rest[0]) != len(m.name) || string(rest[1:1+len(m.name)]) != m.name {
			return bad("member %q is missing or not at its place", m.name)
		}
		size := binary.BigEndian.Uint64(rest[head-8 : head])
		if size > m.limit || size > uint64(len(rest)-head) { //nolint:gosec // len(rest) >= head was checked
			return bad("member %q says %d bytes; limit %d, left %d", m.name, size, m.limit, len(rest)-head)
		}
		end := head + int(size) //nolint:gosec // size is at most m.limit
		*m.content, rest = rest[head:end], rest[end:]
	}
	if len(rest) != 0 {
		return bad("%d bytes after the last member", len(rest))
	}
	return b, nil
}

type member struct {
	name    string
	content *[]byte
	limit   uint64
}

func (b *Bundle) members() []member {
	return []member{
		{"manifest", &b.Manifest, MaxManifest},
		{"module", &b.Module, MaxModule},
	}
}
