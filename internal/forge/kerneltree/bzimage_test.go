// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// image makes a bzImage with a payload (Documentation/arch/x86/boot.rst).
func image(payload []byte) []byte {
	const sectors = 1
	b := make([]byte, (sectors+1)*512)
	b[0x1f1] = sectors
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(b[0x248:], 16)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	return append(append(b, make([]byte, 16)...), payload...)
}

// The build appends the size to every compression but gzip, which has it.
func TestPayloadOfEachCompression(t *testing.T) {
	want := bytes.Repeat([]byte("vmlinux "), 4096)
	size := binary.LittleEndian.AppendUint32(nil, uint32(len(want)))
	var g bytes.Buffer
	w := gzip.NewWriter(&g)
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, packed := range map[string][]byte{"gzip": g.Bytes(), "zstd": append(e.EncodeAll(want, nil), size...)} {
		got, err := payload(append(image(packed), "what follows"...))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if _, err := payload(image([]byte("not compressed"))); err == nil {
		t.Error("a payload of no known compression was read")
	}
}
