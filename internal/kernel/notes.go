// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"

	"klatch/internal/fault"
)

// MaxNotes limits what is read of /sys/kernel/notes. Real ones are under 1 KiB.
const MaxNotes = 64 << 10

const noteGNUBuildID = 3 // NT_GNU_BUILD_ID, elf.h

// ParseNotes finds the GNU build id in ELF notes, the form of
// /sys/kernel/notes and of a .notes section (elf(5), "Notes": three words,
// then name and descriptor, each padded to 4 bytes). Words are little-endian,
// as on all architectures supported.
func ParseNotes(b []byte) (BuildID, error) {
	var id BuildID
	if len(b) > MaxNotes {
		return id, fault.New(fault.Invalid, "bad_notes", "kernel notes have %d bytes, limit %d", len(b), MaxNotes)
	}
	for len(b) >= 12 {
		nameLen := uint64(binary.LittleEndian.Uint32(b[0:]))
		descLen := uint64(binary.LittleEndian.Uint32(b[4:]))
		kind := binary.LittleEndian.Uint32(b[8:])
		b = b[12:]
		name, rest, ok := cut(b, nameLen)
		if !ok {
			break
		}
		desc, rest, ok := cut(rest, descLen)
		if !ok {
			break
		}
		b = rest
		if kind == noteGNUBuildID && string(name) == "GNU\x00" {
			if len(desc) != len(id) {
				return id, fault.New(fault.Invalid, "bad_notes", "build id has %d bytes, want %d", len(desc), len(id))
			}
			copy(id[:], desc)
			return id, nil
		}
	}
	return id, fault.New(fault.NotFound, "no_build_id", "no GNU build id in the kernel notes")
}

// cut takes n bytes and skips the padding to a multiple of 4, which the last
// field may lack.
func cut(b []byte, n uint64) (field, rest []byte, ok bool) {
	if n > uint64(len(b)) {
		return nil, nil, false
	}
	padded := min((n+3)&^3, uint64(len(b)))
	return b[:n], b[padded:], true
}
