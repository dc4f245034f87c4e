// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// Sizes and numbers of elf(5) for a 64-bit file.
const (
	ehdrSize    = 64
	shdrSize    = 64
	maxSections = 0xff00 // SHN_LORESERVE; a livepatch has a few for each function
	maxModinfo  = 64 << 10
	shtNobits   = 8
)

// checkELF is the policy for a module's own words: a relocatable x86-64
// livepatch with the name, kernel release, build id and sequence of its
// manifest, which depends on no other module.
func checkELF(module []byte, m livepatch.Manifest) error {
	words, err := readModinfo(module)
	if err != nil {
		return err
	}
	for key, want := range map[string]string{
		"name":            m.Module.Name,
		"livepatch":       "Y",
		"depends":         "", // the list of allowed modules is empty for now
		"klatch_build_id": m.Kernel.ID.String(),
		"klatch_sequence": strconv.FormatUint(uint64(m.Sequence), 10),
		"vermagic":        string(m.Kernel.Release),
	} {
		got := words[key]
		if len(got) != 1 {
			return fault.New(fault.Untrusted, "module_policy", "module says %q %d times, want once", key, len(got))
		}
		if key == "vermagic" { // release, then configuration words that the kernel compares itself
			got[0], _, _ = strings.Cut(got[0], " ")
		}
		if got[0] != want {
			return fault.New(fault.Untrusted, "module_policy", "module says %s=%.80q, want %q", key, got[0], want)
		}
	}
	return nil
}

type section struct{ name, kind, offset, size uint64 }

// readModinfo reads the section .modinfo of a relocatable file: words
// key=value, each ended by NUL. Nothing else of the file is used; every
// section must lie inside it and apart from the others.
func readModinfo(b []byte) (map[string][]string, error) {
	bad := func(format string, args ...any) (map[string][]string, error) {
		return nil, fault.New(fault.Untrusted, "module_elf", "module: "+format, args...)
	}
	le := binary.LittleEndian
	if len(b) < ehdrSize || !bytes.HasPrefix(b, []byte("\x7fELF\x02\x01\x01")) {
		return bad("not a 64-bit little-endian ELF file")
	}
	if kind, machine := le.Uint16(b[16:]), le.Uint16(b[18:]); kind != 1 || machine != 62 {
		return bad("ELF type %d for machine %d, want relocatable for x86-64", kind, machine)
	}
	table, count, names := le.Uint64(b[40:]), uint64(le.Uint16(b[60:])), uint64(le.Uint16(b[62:]))
	if le.Uint16(b[52:]) != ehdrSize || le.Uint16(b[58:]) != shdrSize || count == 0 || count > maxSections || names >= count {
		return bad("ELF header with %d sections, names in %d", count, names)
	}
	if table < ehdrSize || table > uint64(len(b)) || count*shdrSize > uint64(len(b))-table {
		return bad("section table lies outside")
	}
	sections := make([]section, count)
	spans := []section{{size: ehdrSize}, {offset: table, size: count * shdrSize}}
	for i := range sections {
		h := b[table+uint64(i)*shdrSize:]
		s := section{uint64(le.Uint32(h)), uint64(le.Uint32(h[4:])), le.Uint64(h[24:]), le.Uint64(h[32:])}
		sections[i] = s
		if i == 0 || s.kind == shtNobits || s.size == 0 {
			continue
		}
		if s.offset > uint64(len(b)) || s.size > uint64(len(b))-s.offset {
			return bad("section %d lies outside", i)
		}
		spans = append(spans, s)
	}
	slices.SortFunc(spans, func(x, y section) int { return cmp.Compare(x.offset, y.offset) })
	for i := range spans[1:] {
		if spans[i].offset+spans[i].size > spans[i+1].offset {
			return bad("sections overlap at byte %d", spans[i+1].offset)
		}
	}
	content := func(s section) []byte {
		if s.kind == shtNobits || s.size == 0 {
			return nil
		}
		return b[s.offset : s.offset+s.size]
	}
	var info []byte
	for _, s := range sections[1:] {
		name := content(sections[names])
		if s.name >= uint64(len(name)) || !bytes.HasPrefix(name[s.name:], []byte(".modinfo\x00")) {
			continue
		}
		if info != nil || s.size == 0 || s.size > maxModinfo {
			return bad("section .modinfo is there twice, empty or over %d bytes", maxModinfo)
		}
		info = content(s)
	}
	words := map[string][]string{}
	for w := range strings.SplitSeq(string(info), "\x00") {
		if key, value, ok := strings.Cut(w, "="); ok {
			words[key] = append(words[key], value)
		}
	}
	return words, nil
}
