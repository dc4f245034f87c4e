// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/efi"
)

// The firmware of Debian's package ovmf. The code is the one that keeps its
// variables out of reach of the guest (system management mode); the store is
// the empty one.
const (
	ovmfCode  = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	ovmfStore = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// Names in a machine's folder, and the size of its boot disk.
const (
	storeName   = "variables.fd"
	espName     = "esp.img"
	maxStore    = 4 << 20
	espMiB      = 64
	espMinimum  = 16 // MiB beside the kernel and the initramfs
	sectorBytes = 512
)

// uefi is the firmware of a machine and the disk that it starts from.
type uefi struct {
	plain
	store      string // what the variables begin with
	shim, grub string
	filled     bool // the boot disk has all but the command line
}

func newUEFI(f lab.Firmware) (*uefi, error) {
	u := &uefi{store: cmp.Or(f.Store, ovmfStore)}
	if (f.Shim == "") != (f.Grub == "") {
		return nil, errors.New("firmware wants shim and GRUB, or neither")
	}
	for name, to := range map[string]*string{f.Shim: &u.shim, f.Grub: &u.grub, u.store: &u.store, ovmfCode: new(string)} {
		if name == "" {
			continue
		}
		path, err := filepath.Abs(name)
		if err != nil {
			return nil, err
		}
		if _, err := os.Stat(path); err != nil {
			return nil, err
		}
		*to = path
	}
	return u, nil
}

func (*uefi) args() []string {
	return []string{"-global", "driver=cfi.pflash01,property=secure,value=on", "-machine", "smm=on",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + ovmfCode,
		"-drive", "if=pflash,unit=1,format=raw,file=" + storeName,
		"-drive", "if=none,id=esp,format=raw,file=" + espName, "-device", "virtio-blk-pci,drive=esp"}
}

// prepare makes what the next start needs: the variables with their changes,
// and the kernel with its command line on the boot disk. What the guest wrote
// into variables stays.
func (u *uefi) prepare(dir string, kernel boot, flash []efi.Variable) error {
	store := filepath.Join(dir, storeName)
	from := store
	if !u.filled {
		from = u.store
	}
	b, err := durable.ReadFile(from, maxStore)
	if err != nil {
		return err
	}
	line := strings.Join(kernel.commandLine, " ")
	if kernel.initrd != "" && u.shim == "" {
		line = `initrd=\initrd.img ` + line // to the kernel's own loader (Documentation/admin-guide/efi-stub.rst)
	}
	if u.shim == "" {
		flash = append(flash, efi.Boot(`\vmlinuz.efi`, line)...)
	}
	if b, err = efi.Change(b, flash...); err != nil {
		return err
	}
	if err := durable.WriteFile(store, b, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if !u.filled {
		if err := u.fill(ctx, dir, kernel); err != nil {
			return err
		}
		u.filled = true
	}
	if u.shim == "" {
		return nil
	}
	grub := "linux /vmlinuz.efi " + line + "\n"
	if kernel.initrd != "" {
		grub += "initrd /initrd.img\n"
	}
	return u.write(ctx, dir, "EFI/debian/grub.cfg", grub+"boot\n")
}

// fill makes the boot disk, with one FAT file system that fills it, without
// root.
func (u *uefi) fill(ctx context.Context, dir string, kernel boot) error {
	files := map[string]string{kernel.kernel: "vmlinuz.efi"}
	if kernel.initrd != "" {
		initrd := kernel.initrd
		if !filepath.IsAbs(initrd) {
			initrd = filepath.Join(dir, initrd)
		}
		files[initrd] = "initrd.img"
	}
	if u.shim != "" {
		files[u.shim], files[u.grub] = "EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/grubx64.efi"
	}
	size := int64(espMinimum) << 20
	for f := range files {
		st, err := os.Stat(f)
		if err != nil {
			return err
		}
		size += st.Size()
	}
	esp := filepath.Join(dir, espName)
	sectors := max(size, espMiB<<20) / sectorBytes
	if err := command(ctx, "mformat", "-i", esp, "-C", "-T", fmt.Sprint(sectors), "-h", "64", "-s", "32", "::"); err != nil {
		return err
	}
	if err := command(ctx, "mmd", "-i", esp, "::/EFI", "::/EFI/BOOT", "::/EFI/debian"); err != nil {
		return err
	}
	for from, to := range files {
		if err := command(ctx, "mcopy", "-i", esp, from, "::/"+to); err != nil {
			return err
		}
	}
	return nil
}

func (u *uefi) write(ctx context.Context, dir, name, text string) error {
	file := filepath.Join(dir, filepath.Base(name))
	if err := durable.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	return command(ctx, "mcopy", "-o", "-i", filepath.Join(dir, espName), file, "::/"+name)
}

// nothingToStart is what EDK2 says when it has tried everything, and then waits
// for a key for ever.
const (
	firmwareSays   = "BdsDxe: "
	nothingToStart = firmwareSays + "No bootable option or device was found"
)

// watchFirmware ends a wait when the firmware has given up.
func (m *machine) watchFirmware(ctx context.Context, refused context.CancelCauseFunc) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			text, err := m.Console()
			if err != nil || !strings.Contains(text, nothingToStart) {
				continue
			}
			var why []string
			for line := range strings.Lines(text) {
				if strings.Contains(line, firmwareSays+"failed to") {
					why = append(why, strings.TrimSpace(line))
				}
			}
			refused(fmt.Errorf("the firmware starts nothing from this disk: %q", why))
			return
		}
	}
}
