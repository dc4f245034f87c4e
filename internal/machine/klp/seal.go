// SPDX-License-Identifier: Apache-2.0

package klp

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
)

// Sealed is a file's content in memory that nobody can change any more, root
// included (memfd_create(2), fcntl(2) "File Sealing"): what was checked is what
// is loaded.
type Sealed struct {
	File           *os.File
	Bytes          []byte // the same memory, read only, until Close
	SHA256, SHA512 string // hexadecimal, computed while copying
}

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Seal copies a regular file from its beginning; of one longer than limit it
// takes limit+1 bytes, so that the caller sees it. The descriptor comes from a
// stranger: a FIFO, a device, a symbolic link or one that may not be read is
// refused.
func Seal(from *os.File, limit int64) (_ *Sealed, err error) {
	st, err := from.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return nil, fault.New(fault.Invalid, "bad_descriptor", "the descriptor is not a regular file")
	}
	// Without MFD_NOEXEC_SEAL a hardened kernel refuses (sysctl vm.memfd_noexec);
	// kernels before 6.3 do not know it.
	fd, err := unix.MemfdCreate("klatch-module", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("klatch-module", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("make a memory file: %w", err)
	}
	s := &Sealed{File: os.NewFile(uintptr(fd), "sealed module")}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	h256, h512 := sha256.New(), sha512.New()
	n, err := io.Copy(io.MultiWriter(s.File, h256, h512), io.NewSectionReader(from, 0, limit+1))
	if errors.Is(err, unix.EBADF) {
		return nil, fault.New(fault.Invalid, "bad_descriptor", "the descriptor cannot be read")
	}
	if err != nil {
		return nil, fmt.Errorf("copy into memory: %w", err)
	}
	s.SHA256, s.SHA512 = hex.EncodeToString(h256.Sum(nil)), hex.EncodeToString(h512.Sum(nil))
	if _, err := unix.FcntlInt(s.File.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal the memory file: %w", err)
	}
	if n > 0 { // private, because kernels before 6.7 refuse a shared mapping of a sealed file
		if s.Bytes, err = unix.Mmap(fd, 0, int(n), unix.PROT_READ, unix.MAP_PRIVATE); err != nil {
			return nil, fmt.Errorf("map the memory file: %w", err)
		}
	}
	return s, nil
}

// Close frees the memory.
func (s *Sealed) Close() error {
	err := s.File.Close()
	if s.Bytes != nil {
		err = errors.Join(err, unix.Munmap(s.Bytes))
		s.Bytes = nil
	}
	return err
}
