// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"klatch/internal/fault"
)

// maxVmlinux limits an uncompressed kernel image, in bytes. Debian's are
// below 80 MiB.
const maxVmlinux = 512 << 20

// payload takes the compressed vmlinux out of a bzImage and uncompresses it
// (Documentation/x86/boot.rst, fields setup_sects, payload_offset and
// payload_length of the real-mode kernel header).
func payload(bz []byte) ([]byte, error) {
	bad := func(format string, args ...any) ([]byte, error) {
		return nil, fault.New(fault.Invalid, "bad_kernel_image", "kernel image: "+format, args...)
	}
	if len(bz) < 0x250 || string(bz[0x202:0x206]) != "HdrS" {
		return bad("not a bzImage")
	}
	sectors := uint64(bz[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + uint64(binary.LittleEndian.Uint32(bz[0x248:]))
	size := uint64(binary.LittleEndian.Uint32(bz[0x24c:]))
	if size < 8 || start+size > uint64(len(bz)) {
		return bad("payload of %d bytes at %d is outside the file", size, start)
	}
	// The build appends the uncompressed size as four bytes, outside the
	// compressed stream (scripts/Makefile.lib, size_append), but not for gzip,
	// whose streams end with it (RFC 1952, ISIZE).
	end := start + size - 4
	if bytes.HasPrefix(bz[start:], []byte{0x1f, 0x8b}) {
		end = start + size
	}
	in := bytes.NewReader(bz[start:end])
	r, err := uncompress(in, bz[start:start+6])
	if err != nil {
		return bad("payload: %w", err)
	}
	out, err := io.ReadAll(io.LimitReader(r, maxVmlinux+1))
	if err != nil {
		return bad("uncompress payload: %w", err)
	}
	if len(out) > maxVmlinux {
		return bad("payload is over %d bytes", maxVmlinux)
	}
	return out, nil
}

func uncompress(r io.Reader, magic []byte) (io.Reader, error) {
	switch {
	case bytes.HasPrefix(magic, []byte{0x02, 0x21, 0x4c, 0x18}): // LZ4, legacy frame
		return lz4.NewReader(r), nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return zstd.NewReader(r, zstd.WithDecoderMaxMemory(maxVmlinux))
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z'}):
		return xz.NewReader(r)
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(r)
	}
	return nil, fmt.Errorf("compression with magic %x is unknown", magic)
}
