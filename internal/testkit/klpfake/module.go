// SPDX-License-Identifier: Apache-2.0

package klpfake

import (
	"encoding/binary"
	"fmt"
	"strings"

	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Words are those that a livepatch module of ours says in .modinfo.
func Words(b kernel.Build, n livepatch.Sequence) []string {
	return []string{
		"license=GPL", "livepatch=Y", "depends=", "name=" + n.ModuleName(),
		fmt.Sprintf("klatch_build_id=%s", b.ID), fmt.Sprintf("klatch_sequence=%d", n),
		fmt.Sprintf("vermagic=%s SMP preempt mod_unload modversions ", b.Release),
	}
}

// Module is the smallest relocatable file with these words. No kernel would
// run it; the loader's policy takes it.
func Module(words []string) []byte {
	return ELF(Section{".text", 1, []byte{0xc3, 0, 0, 0}}, Section{".modinfo", 1, []byte(strings.Join(words, "\x00") + "\x00")})
}

// Section is one section of ELF.
type Section struct {
	Name string
	Kind uint32
	Body []byte
}

// ELF writes a relocatable x86-64 file: header, sections one after the other,
// .shstrtab, section table.
func ELF(sections ...Section) []byte {
	le := binary.LittleEndian
	names := []byte{0}
	sections = append(sections, Section{".shstrtab", 3, nil})
	var at []uint32
	for _, s := range sections {
		at = append(at, uint32(len(names)))
		names = append(append(names, s.Name...), 0)
	}
	sections[len(sections)-1].Body = names

	out := make([]byte, 64)
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], 1)  // ET_REL
	le.PutUint16(out[18:], 62) // EM_X86_64
	le.PutUint32(out[20:], 1)
	le.PutUint16(out[52:], 64)
	le.PutUint16(out[58:], 64)
	le.PutUint16(out[60:], uint16(len(sections)+1))
	le.PutUint16(out[62:], uint16(len(sections)))
	table := make([]byte, 64)
	for i, s := range sections {
		h := make([]byte, 64)
		le.PutUint32(h[0:], at[i])
		le.PutUint32(h[4:], s.Kind)
		le.PutUint64(h[24:], uint64(len(out)))
		le.PutUint64(h[32:], uint64(len(s.Body)))
		le.PutUint64(h[48:], 1)
		table = append(table, h...)
		out = append(out, s.Body...)
	}
	for len(out)%8 != 0 {
		out = append(out, 0)
	}
	le.PutUint64(out[40:], uint64(len(out)))
	return append(out, table...)
}
