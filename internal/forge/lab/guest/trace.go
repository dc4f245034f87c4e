// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"
	"unsafe"
)

// TraceArg is the argument that makes a guest's init program attach a BPF
// program instead, followed by "fentry" or "fexit", the kernel's function and
// the file for the number of its calls: "/proc/1/exe TraceArg fentry f /tmp/n".
const TraceArg = "klatch-lab-trace"

// Numbers of bpf(2), include/uapi/linux/bpf.h. The guests are x86-64.
const (
	sysBPF               = 321
	bpfMapCreate         = 0
	bpfMapLookup         = 1
	bpfProgLoad          = 5
	bpfRawTracepointOpen = 17
	bpfMapTypeArray      = 2
	bpfProgTypeTracing   = 26
	bpfTraceFentry       = 24
	bpfTraceFexit        = 25
)

// trace attaches a BPF program to a kernel function, as a monitoring agent
// does, and counts its calls until it is ended. file holds the number of calls,
// renewed ten times a second, from the moment the program is attached. It uses
// bpf(2) alone and the kernel's own type information: a guest needs nothing else.
func trace(kind, function, file string) error {
	attach, ok := map[string]uint32{"fentry": bpfTraceFentry, "fexit": bpfTraceFexit}[kind]
	if !ok {
		return fmt.Errorf("no kind %q", kind)
	}
	btf, err := os.ReadFile("/sys/kernel/btf/vmlinux")
	if err != nil {
		return err
	}
	id, err := funcID(btf, function)
	if err != nil {
		return err
	}
	counter, err := makeCounter()
	if err != nil {
		return err
	}
	program, err := loadProgram(counter, attach, id)
	if err != nil {
		return err
	}
	link := struct {
		name uint64
		fd   uint32
		_    uint32
	}{fd: uint32(program)} //nolint:gosec // a descriptor
	if _, err := bpf(bpfRawTracepointOpen, unsafe.Pointer(&link), unsafe.Sizeof(link)); err != nil {
		return fmt.Errorf("attach %s to %s: %w", kind, function, err)
	}
	for ; ; <-time.After(100 * time.Millisecond) { // until it is killed
		n, err := readCounter(counter)
		if err != nil {
			return err
		}
		if err := os.WriteFile(file+".new", strconv.AppendUint(nil, n, 10), 0o600); err != nil { //nolint:forbidigo // in a guest that is thrown away
			return err
		}
		if err := os.Rename(file+".new", file); err != nil {
			return err
		}
	}
}

func bpf(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, e := syscall.Syscall(sysBPF, uintptr(command), uintptr(attr), size)
	if e != 0 {
		return -1, e
	}
	return int(fd), nil
}

// makeCounter makes an array map with one number.
func makeCounter() (int, error) {
	attr := struct{ kind, key, value, entries, flags uint32 }{bpfMapTypeArray, 4, 8, 1, 0}
	fd, err := bpf(bpfMapCreate, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return 0, fmt.Errorf("make a map: %w", err)
	}
	return fd, nil
}

func readCounter(counter int) (uint64, error) {
	var memory runtime.Pinner
	defer memory.Unpin()
	var key uint32
	var value uint64
	attr := struct {
		fd         uint32
		_          uint32
		key, value uint64
		flags      uint64
	}{fd: uint32(counter), key: address(&memory, &key), value: address(&memory, &value)} //nolint:gosec // a descriptor
	_, err := bpf(bpfMapLookup, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return value, err
}

// address is where the kernel finds a value, which stays there until it is
// unpinned.
func address[T any](memory *runtime.Pinner, p *T) uint64 {
	memory.Pin(p)
	return uint64(uintptr(unsafe.Pointer(p)))
}

// loadProgram loads: add one to the counter, return 0.
func loadProgram(counter int, attach, target uint32) (int, error) {
	var memory runtime.Pinner
	defer memory.Unpin()
	var text bytes.Buffer
	for _, i := range []struct {
		code, regs uint8 // dst in the low four bits
		off        int16
		imm        int32
	}{
		{0x18, 1 | 2<<4, 0, int32(counter)}, //nolint:gosec // r1 = address of the map's value (BPF_PSEUDO_MAP_VALUE), by its descriptor
		{0, 0, 0, 0},
		{0xb7, 2, 0, 1},        // r2 = 1
		{0xdb, 1 | 2<<4, 0, 0}, // lock *(u64 *)r1 += r2
		{0xb7, 0, 0, 0},        // r0 = 0
		{0x95, 0, 0, 0},        // exit
	} {
		if err := binary.Write(&text, binary.LittleEndian, i); err != nil {
			return 0, err
		}
	}
	const instructions, logSize = 6, 64 << 10
	code, license, log := text.Bytes(), []byte("Apache-2.0\x00"), make([]byte, logSize)
	attr := struct {
		kind, count      uint32
		code, license    uint64
		level, logSize   uint32
		log              uint64
		version, flags   uint32
		name             [16]byte
		ifindex, attach  uint32
		btf, funcSize    uint32
		funcs            uint64
		funcCount, lines uint32
		line             uint64
		lineCount, id    uint32
		targetFD, _      uint32
	}{kind: bpfProgTypeTracing, count: instructions, code: address(&memory, &code[0]), license: address(&memory, &license[0]),
		level: 1, logSize: logSize, log: address(&memory, &log[0]), attach: attach, id: target}
	copy(attr.name[:], "klatch_lab")
	fd, err := bpf(bpfProgLoad, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		said, _, _ := bytes.Cut(log, []byte{0})
		return 0, fmt.Errorf("load program: %w: %s", err, said)
	}
	return fd, nil
}

// funcID finds a function's number in BTF (Documentation/bpf/btf.rst).
func funcID(b []byte, name string) (uint32, error) {
	le := binary.LittleEndian
	malformed := errors.New("BTF is not in a form that is known")
	if len(b) < 24 || le.Uint16(b) != 0xeb9f {
		return 0, malformed
	}
	head := le.Uint32(b[4:])
	part := func(at int) []byte {
		from := uint64(head) + uint64(le.Uint32(b[at:]))
		return b[min(from, uint64(len(b))):min(from+uint64(le.Uint32(b[at+4:])), uint64(len(b)))]
	}
	types, words := part(8), part(16)
	const kindFunc = 12
	for id := uint32(1); len(types) >= 12; id++ {
		info := le.Uint32(types[4:])
		kind, n := info>>24&0x1f, int(info&0xffff)
		if at := le.Uint32(types); kind == kindFunc && uint64(at) < uint64(len(words)) {
			if found, _, _ := bytes.Cut(words[at:], []byte{0}); string(found) == name {
				return id, nil
			}
		}
		more := 0
		switch kind {
		case 1, 14, 17: // integer, variable, tag
			more = 4
		case 3: // array
			more = 12
		case 4, 5, 15, 19: // structure, union, section, 64-bit enumeration
			more = 12 * n
		case 6, 13: // enumeration, prototype
			more = 8 * n
		}
		if len(types) < 12+more {
			return 0, malformed
		}
		types = types[12+more:]
	}
	return 0, fmt.Errorf("no function %s in the kernel's type information", name)
}
