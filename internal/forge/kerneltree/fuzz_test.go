// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

// image makes a bzImage around a payload.
func unitImage(payload []byte) []byte {
	b := make([]byte, 1024)
	copy(b[0x202:], "HdrS")
	b[0x1f1] = 1
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)+4))
	return append(append(b, payload...), 0, 0, 0, 0)
}

// FuzzImage reads any bytes as an image to boot, and as the kernel in it.
func FuzzImage(f *testing.F) {
	for _, magic := range []string{"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00", "\xfd7zXZ\x00", "\x28\xb5\x2f\xfd", "\x02\x21\x4c\x18"} {
		f.Add(unitImage([]byte(magic)))
	}
	f.Fuzz(func(_ *testing.T, b []byte) {
		if _, err := payload(b); err == nil {
			_, _ = identify(bytes.NewReader(b), "x")
		}
		if id, err := identify(bytes.NewReader(b), "x"); err == nil {
			_, _ = compilerOf(id.banner)
		}
	})
}

// FuzzSymbols reads any bytes as a module with symbols and structure sizes.
func FuzzSymbols(f *testing.F) {
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte("char klatch_ALT_STRUCT_SIZE[12], klatch_BUG_STRUCT_SIZE[16]; int a(void) { return 1; }\n"), 0o644); err != nil {
		f.Fatal(err)
	}
	object, err := compileSeed(dir)
	if err != nil {
		f.Skip(err)
	}
	f.Add(object)
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "x.o")
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		_, _ = probedSizes(file)
		if e, err := elf.NewFile(bytes.NewReader(b)); err == nil {
			_, _ = printSymbols(e)
			_ = buildNote(e)
		}
	})
}
