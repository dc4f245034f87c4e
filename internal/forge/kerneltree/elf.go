// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"io"
	"regexp"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// identity is what two files must share to be the same compiled kernel.
type identity struct {
	build  kernel.BuildID
	text   [32]byte // SHA-256 of .text
	banner string   // "Linux version …"
}

func identify(r io.ReaderAt, name string) (identity, error) {
	var id identity
	f, err := elf.NewFile(r)
	if err != nil {
		return id, fault.New(fault.Invalid, "bad_kernel_image", "read ELF file %s: %w", name, err)
	}
	section := func(s string) ([]byte, error) {
		sec := f.Section(s)
		if sec == nil || sec.Size > maxVmlinux {
			return nil, fault.New(fault.Invalid, "bad_kernel_image", "%s has no usable section %s", name, s)
		}
		return sec.Data()
	}
	notes, err := section(".notes")
	if err != nil {
		return id, err
	}
	if id.build, err = kernel.ParseNotes(notes); err != nil {
		return id, fmt.Errorf("build id of %s: %w", name, err)
	}
	text, err := section(".text")
	if err != nil {
		return id, err
	}
	id.text = sha256.Sum256(text)
	rodata, err := section(".rodata")
	if err != nil {
		return id, err
	}
	if i := bytes.Index(rodata, []byte("Linux version ")); i >= 0 {
		line, _, _ := bytes.Cut(rodata[i:min(len(rodata), i+512)], []byte("\n"))
		id.banner = string(line)
	}
	return id, nil
}

// compilerPattern finds the compiler in the kernel's banner
// (scripts/mkcompile_h: LINUX_COMPILER is "compiler, linker").
var compilerPattern = regexp.MustCompile(`^Linux version \S+ \([^)]*\) \(((?:[a-z0-9_-]*gcc\S*|clang) [^,]*), `)

func compilerOf(banner string) (string, error) {
	m := compilerPattern.FindStringSubmatch(banner)
	if m == nil {
		return "", fault.New(fault.Invalid, "bad_kernel_image", "no compiler in the kernel's banner %.200q", banner)
	}
	return m[1], nil
}

// sameKernel proves that an image and a vmlinux are one compiled kernel: same
// build id, same text, same banner.
func sameKernel(bz []byte, vmlinux, name string) (kernel.BuildID, error) {
	var none kernel.BuildID
	raw, err := payload(bz)
	if err != nil {
		return none, err
	}
	want, err := identify(bytes.NewReader(raw), name)
	if err != nil {
		return none, err
	}
	have, err := identifyFile(vmlinux)
	if err != nil {
		return none, err
	}
	if have != want {
		return none, fault.New(fault.Untrusted, "symbols_mismatch", "vmlinux is of build %s, image %s is %s; texts equal: %v",
			have.build, name, want.build, have.text == want.text).WithHint("name image and vmlinux of one build")
	}
	return have.build, nil
}
