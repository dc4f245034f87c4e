// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cavaliergopher/cpio"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/guest"
)

// entry is one file of the small guest.
type entry struct {
	mode fs.FileMode
	open func() (io.ReadCloser, int64, error)
}

// SmallGuest writes the initramfs of the small guest into a folder and gives
// its path: for a board that boots from the network, or for a test of one.
func (r *Rig) SmallGuest(dir string) (initrd string, err error) {
	return filepath.Join(dir, initrdName), r.writeSmallGuest(dir, nil)
}

// writeSmallGuest writes the initramfs: the agent as init, busybox, and the
// given files. It is not compressed: that would cost more than it saves.
func (r *Rig) writeSmallGuest(dir string, files []lab.File) error {
	entries := map[string]entry{
		"init":                                fromPath(r.cfg.Guest, 0o755),
		"bin/busybox":                         fromPath(r.cfg.Busybox, 0o755),
		strings.TrimPrefix(guest.Marker, "/"): fromBytes(nil, 0o644),
		"etc/passwd":                          fromBytes([]byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"), 0o644),
		"etc/group":                           fromBytes([]byte("root:x:0:\nnogroup:x:65534:\n"), 0o644),
		"etc/hosts":                           fromBytes([]byte("127.0.0.1 localhost lab\n"), 0o644),
	}
	dirs := map[string]bool{}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "run", "root", "etc", "bin", "sbin", "usr/bin", "usr/sbin",
		"var", "mnt", strings.TrimPrefix(lab.FilesDir, "/")} {
		addParents(dirs, d+"/x")
	}
	for _, f := range files {
		name, err := guestName(f)
		if err != nil {
			return err
		}
		addParents(dirs, name)
		entries[name] = fromFile(f)
	}

	out, err := os.Create(filepath.Join(dir, initrdName))
	if err != nil {
		return err
	}
	defer out.Close() //nolint:errcheck // closed with its error below
	w := cpio.NewWriter(out)
	for _, d := range slices.Sorted(maps.Keys(dirs)) {
		if err := w.WriteHeader(&cpio.Header{Name: d, Mode: cpio.TypeDir | 0o755, Links: 2}); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		if err := writeEntry(w, name, entries[name]); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), out.Close())
}

func writeEntry(w *cpio.Writer, name string, e entry) error {
	in, size, err := e.open()
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // opened for reading only
	h := &cpio.Header{Name: name, Mode: cpio.TypeReg | cpio.FileMode(e.mode.Perm()), Size: size, Links: 1}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(w, in)
	return err
}

// guestName is where a file of the Spec goes, without the leading slash.
func guestName(f lab.File) (string, error) {
	if !fs.ValidPath(f.Name) || f.Name == "." {
		return "", fmt.Errorf("guest file %q: not a relative path", f.Name)
	}
	return path.Join(strings.TrimPrefix(lab.FilesDir, "/"), f.Name), nil
}

func addParents(dirs map[string]bool, name string) {
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		dirs[d] = true
	}
}

func fromBytes(b []byte, mode fs.FileMode) entry {
	return entry{mode, func() (io.ReadCloser, int64, error) {
		return io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
	}}
}

func fromPath(p string, mode fs.FileMode) entry {
	return entry{mode, func() (io.ReadCloser, int64, error) {
		f, err := os.Open(p)
		if err != nil {
			return nil, 0, err
		}
		st, err := f.Stat()
		if err != nil {
			return nil, 0, errors.Join(err, f.Close())
		}
		return f, st.Size(), nil
	}}
}

func fromFile(f lab.File) entry {
	mode := f.Mode
	if mode == 0 {
		mode = 0o644
	}
	if f.Source != "" {
		return fromPath(f.Source, mode)
	}
	return fromBytes(f.Data, mode)
}

// makeDisks makes the copy-on-write layer of the root disk and the read-only
// disk with the agent and the given files.
func (r *Rig) makeDisks(ctx context.Context, s lab.Spec, dir string) (disks, error) {
	base, err := filepath.Abs(s.Root)
	if err != nil {
		return nil, err
	}
	overlay := filepath.Join(dir, overlayName)
	if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay); err != nil {
		return nil, err
	}
	if err := r.makeFilesDisk(ctx, s, dir); err != nil {
		return nil, fmt.Errorf("make files disk: %w", err)
	}
	return disks{
		{id: "root", file: overlayName, format: "qcow2"},
		{id: "files", file: filesName, format: "raw", readOnly: true},
	}, nil
}

func (r *Rig) makeFilesDisk(ctx context.Context, s lab.Spec, dir string) error {
	tree := filepath.Join(dir, "files")
	all := append([]lab.File{{Name: guest.AgentName, Source: r.cfg.Guest, Mode: 0o755}}, s.Files...)
	var total int64
	for _, f := range all {
		if _, err := guestName(f); err != nil {
			return err
		}
		n, err := copyEntry(filepath.Join(tree, filepath.FromSlash(f.Name)), fromFile(f))
		if err != nil {
			return err
		}
		total += n
	}
	// Blocks for the files, a part for the tables, and some for small files.
	size := total + total/16 + int64(len(all))*8<<10 + 4<<20
	image := filepath.Join(dir, filesName)
	err := command(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "klatch-lab",
		"-E", "root_owner=0:0,lazy_itable_init=1,nodiscard", "-d", tree, image, strconv.FormatInt(size>>10, 10)+"k")
	return errors.Join(err, os.RemoveAll(tree))
}

func copyEntry(to string, e entry) (int64, error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return 0, err
	}
	in, _, err := e.open()
	if err != nil {
		return 0, err
	}
	defer in.Close() //nolint:errcheck // opened for reading only
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, e.mode.Perm())
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(out, in)
	return n, errors.Join(err, out.Chmod(e.mode.Perm()), out.Close())
}

// mustBeStatic refuses a program that needs a dynamic loader: the small
// guest has none, and would say only that init was not found.
func mustBeStatic(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("not a static program (build it with CGO_ENABLED=0)")
		}
	}
	return nil
}
