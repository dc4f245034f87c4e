// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// diskSize is sparse: an image takes what its files take.
const diskSize = "3G"

// chrootPath is the PATH of programs inside the tree.
const chrootPath = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

// builder makes one image.
type builder struct {
	cfg     Config
	tree    string // root file system on its way
	out     string // folder of the finished image
	release string
	initrd  bool
}

// run does the steps in order.
func (b *builder) run(ctx context.Context, rec recipe) error {
	var src source
	steps := []struct {
		name, what string
		do         func() error
	}{
		{"sources", "ask apt for the mirror of " + b.cfg.Suite, func() (err error) { src, err = findSource(ctx, b.cfg.Suite); return err }},
		{"debootstrap", strings.Join(rec.Packages, " "), func() error { return b.debootstrap(ctx, src, rec.Packages) }},
		{"kernel", filepath.Base(b.cfg.KernelDeb), func() error { return b.installKernel(ctx) }},
		{"settings", "agent, network, units that only cost time", func() error { return b.settings(src) }},
		{"trim", "package caches, documentation", b.trim},
		{"disk", rootName, func() error { return b.makeDisk(ctx) }},
	}
	for _, s := range steps {
		began := time.Now()
		b.progress(Step{Name: s.name, What: s.what})
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		b.progress(Step{Name: s.name, What: s.what, Done: true, Took: time.Since(began)})
	}
	return nil
}

func (b *builder) progress(s Step) {
	if b.cfg.Progress != nil {
		b.cfg.Progress(s)
	}
}

func (b *builder) debootstrap(ctx context.Context, src source, packages []string) error {
	cmd := exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--include="+strings.Join(packages, ","),
		"--keyring="+src.keyring, b.cfg.Suite, b.tree, src.mirror)
	return runIsolated(cmd)
}

// installKernel installs the package as an administrator would, except that
// an initramfs is made only where the kernel cannot mount its root disk
// without one: the stock cloud kernels have NVMe and ext4 built in, and an
// initramfs costs half a minute of building and seconds of every boot.
func (b *builder) installKernel(ctx context.Context) error {
	deb := filepath.Join(b.tree, "kernel.deb")
	if err := copyFile(b.cfg.KernelDeb, deb); err != nil {
		return err
	}
	cmd := b.inTree(ctx, "/usr/bin/dpkg", "--force-unsafe-io", "--install", "/kernel.deb")
	cmd.Env = append(cmd.Env, "INITRD=No") // of /etc/kernel/postinst.d/initramfs-tools
	if err := runIsolated(cmd); err != nil {
		return err
	}
	if err := os.Remove(deb); err != nil {
		return err
	}
	kernels, err := filepath.Glob(filepath.Join(b.tree, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return fmt.Errorf("%s brought %d kernels, want 1", filepath.Base(b.cfg.KernelDeb), len(kernels))
	}
	b.release = strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	if err := copyFile(kernels[0], filepath.Join(b.out, kernelName)); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(b.tree, "boot", "config-"+b.release))
	if err != nil {
		return err
	}
	if bootsAlone(config) {
		return nil
	}
	b.initrd = true
	if err := runIsolated(b.inTree(ctx, "/usr/sbin/update-initramfs", "-c", "-k", b.release)); err != nil {
		return err
	}
	return copyFile(filepath.Join(b.tree, "boot", "initrd.img-"+b.release), filepath.Join(b.out, initrdName))
}

// bootsAlone reports whether a kernel with this config can mount the lab's
// root disk without modules.
func bootsAlone(config []byte) bool {
	for _, want := range []string{"CONFIG_BLK_DEV_NVME=y", "CONFIG_EXT4_FS=y"} {
		if !bytes.Contains(config, []byte("\n"+want+"\n")) {
			return false
		}
	}
	return true
}

// trim takes out what a guest never reads. dpkg still lists those files.
func (b *builder) trim() error {
	var errs []error
	for _, pattern := range []string{"var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*",
		"usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/info/*", "var/log/*.log", "var/log/apt/*"} {
		paths, err := filepath.Glob(filepath.Join(b.tree, pattern))
		errs = append(errs, err)
		for _, p := range paths {
			errs = append(errs, os.RemoveAll(p))
		}
	}
	return errors.Join(errs...)
}

// makeDisk makes the file system straight from the tree: no loop device, no
// mount, nothing to forget.
func (b *builder) makeDisk(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-m", "0", "-L", "klatch-root",
		"-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard",
		"-d", b.tree, filepath.Join(b.out, rootName), diskSize)
	return runIsolated(cmd)
}

// inTree is a program that sees the tree as its root.
func (b *builder) inTree(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{chrootPath, "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: b.tree}
	return cmd
}

// runIsolated runs a program in mount and process namespaces of its own.
// debootstrap mounts things into the tree; when it is killed half-way, those
// mounts and its children go with the namespaces. Otherwise removing the
// tree would reach through the mounts into this machine's files.
func runIsolated(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, lastPart(out))
	}
	return nil
}

// lastPart is enough of a program's output to see why it ended.
func lastPart(out []byte) string {
	const enough = 2000
	return strings.TrimSpace(string(out[max(0, len(out)-enough):]))
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // opened for reading only
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
