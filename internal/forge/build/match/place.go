// SPDX-License-Identifier: Apache-2.0

package match

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
)

// Place is where a function lies in an image.
type Place struct {
	Addr, Size uint64
	Position   int    // among all symbols of its name, from 1
	Of         int    // how many there are
	Traceable  bool   // ftrace knows it
	SHA256     string // of its bytes in the file; relocations of a module are not applied
}

// Place describes the function at an address. ok is false where the image has
// no function of this name there.
func (k *Image) Place(name string, addr uint64) (Place, bool) {
	i := slices.IndexFunc(k.byName[name], func(s symbol) bool { return s.addr == addr && s.code })
	if i < 0 {
		return Place{}, false
	}
	s := k.byName[name][i]
	code := k.bytes(s.addr, s.size)
	if code == nil {
		return Place{}, false
	}
	sum := sha256.Sum256(code)
	p := Place{Addr: addr, Size: s.size, Traceable: k.traceable(s), SHA256: hex.EncodeToString(sum[:])}
	p.Position, p.Of = k.Position(name, addr)
	return p, true
}

// traceable says whether ftrace has a location in the function: at its start,
// after an ENDBR instruction at most (kernel/trace/ftrace.c,
// ftrace_location; arch/x86/include/asm/ibt.h). Functions that are notrace, or
// of an object that is compiled so, have none.
func (k *Image) traceable(s symbol) bool {
	const endbr = 4 // bytes
	k.tracedOnce.Do(k.readTraced)
	i, _ := slices.BinarySearch(k.traced, s.addr)
	return i < len(k.traced) && k.traced[i] <= s.addr+endbr && k.traced[i] < s.addr+s.size
}

// readTraced reads the list of ftrace locations: of vmlinux between two
// symbols (include/asm-generic/vmlinux.lds.h, MCOUNT_REC), of a module the
// relocations of a section.
func (k *Image) readTraced() {
	for _, s := range k.sections {
		if s.name != "__mcount_loc" {
			continue
		}
		for off := uint64(0); off+8 <= uint64(len(s.data)); off += 8 {
			if r, ok := k.relocs[s.addr+off]; ok && r.outside == "" {
				k.traced = append(k.traced, r.addr+uint64(r.addend))
			}
		}
	}
	start, stop := k.byName["__start_mcount_loc"], k.byName["__stop_mcount_loc"]
	if len(start) == 1 && len(stop) == 1 && stop[0].addr > start[0].addr {
		for list := k.bytes(start[0].addr, stop[0].addr-start[0].addr); len(list) >= 8; list = list[8:] {
			k.traced = append(k.traced, binary.LittleEndian.Uint64(list))
		}
	}
	slices.Sort(k.traced)
}

// Names lists the function symbols that begin with a name: itself, and what
// the compiler made of it (name.isra.0, name.cold).
func (k *Image) Names(function string) []string {
	var out []string
	for n, all := range k.byName {
		rest, ok := strings.CutPrefix(n, function)
		if ok && (rest == "" || rest[0] == '.') && slices.ContainsFunc(all, func(s symbol) bool { return s.code }) {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}
