// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"klatch/internal/forge/archive"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit/kerneltest"
	"klatch/internal/trustsign"
)

// TestVMNeighborKernel: another kernel build of the same distribution takes a
// livepatch of ours without a word, and the loader on that kernel refuses it.
func TestVMNeighborKernel(t *testing.T) {
	m := everything(t)
	p := newPublisher(t, "e2e", m)
	// The second fix alone: it uses few symbols of the kernel.
	if err := m.build(t.Context(), 20, m.patches[1:]); err != nil {
		t.Fatal(err)
	}
	release := neighborOf(t, m.kernel, m.builds[20].Module.Path)
	image := filepath.Join(unpacked(t, m.kernel, "linux-image-"+release, "./boot/vmlinuz-*"), "boot", "vmlinuz-"+release)
	anchor, err := trustsign.Anchor(*p.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	b := p.livepatch(20)
	guest, err := m.rig.Boot(t.Context(), lab.Spec{Name: "neighbor", Kernel: image, Files: []lab.File{
		{Name: "trust.json", Data: anchor}, {Name: "manifest", Data: b.Manifest}, {Name: "module", Data: b.Module},
		{Name: "klatch-loader", Source: m.bin + "/klatch-loader", Mode: 0o755},
		{Name: "klatch-hostile", Source: m.bin + "/klatch-hostile", Mode: 0o755},
	}})
	if err != nil {
		t.Fatal(err)
	}
	g := &machine{Machine: guest, t: t}
	defer guest.Close()
	if got := g.sh("uname -r"); got != release {
		t.Fatalf("the guest runs %s", got)
	}
	g.sh(`mkdir -p /etc/klatch /var/lib/klatch-loader /run/klatch && cp /lab/trust.json /etc/klatch && touch /etc/klatch/allow-lab-keys && echo root:x:0:0::/:/bin/sh > /etc/passwd`)
	g.sh(hostile + ` socket /run/klatch/loader.sock ` + lab.FilesDir + `/klatch-loader serve > /tmp/loader.log 2>&1 & sleep 1`)
	ask := func() string { return g.sh(hostile + " load /lab/manifest /lab/module") }
	if got := ask(); !strings.Contains(got, `"code":"wrong_build"`) {
		t.Errorf("the loader says %s", got)
	}
	if got := g.sh("ls /sys/kernel/livepatch; ls -R /var/lib/klatch-loader | grep -c ko; true"); got != "0" {
		t.Errorf("something was loaded or stored: %s", got)
	}
	// Why it matters: nobody else would have said no.
	if got := g.sh("insmod /lab/module && ls /sys/kernel/livepatch"); got != "klatch_20" {
		t.Errorf("the kernel alone: %q", got)
	}
	if got := ask(); !strings.Contains(got, `"code":"wrong_build"`) {
		t.Errorf("the loader says %s", got)
	}
}

// neighborOf finds a kernel build in the archive that would take the module:
// every symbol that it uses has the same checksum there, which is all that a
// kernel with MODVERSIONS compares.
func neighborOf(t *testing.T, k kerneltest.Kernel, module string) string {
	t.Helper()
	uses := versions(t, module)
	releases, err := k.Maker.Archive.Kernels(t.Context(), "cloud-amd64")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range releases {
		if r == string(k.Entry.Release) || !strings.HasPrefix(r, "6.1.0-") {
			continue
		}
		if _, err := k.Maker.Archive.Find(t.Context(), "linux-headers-"+r, ""); err != nil {
			continue // only its name is left
		}
		dir := unpacked(t, k, "linux-headers-"+r, "./usr/src/*/Module.symvers")
		b, err := os.ReadFile(filepath.Join(dir, "usr", "src", "linux-headers-"+r, "Module.symvers"))
		if err != nil {
			t.Fatal(err)
		}
		missing := len(uses)
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if crc, used := uses[f[1]]; used {
				if have, err := strconv.ParseUint(f[0], 0, 64); err == nil && have == crc {
					missing--
				}
			}
		}
		if missing == 0 {
			return r
		}
	}
	t.Skip("need a kernel in the archive that would take the module of " + string(k.Entry.Release))
	return ""
}

// versions reads the checksums that a module wants: struct modversion_info of
// linux/module.h, a word and 56 bytes of name.
func versions(t *testing.T, module string) map[string]uint64 {
	t.Helper()
	f, err := elf.Open(module)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := f.Section("__versions").Data()
	if err != nil || len(b) == 0 || len(b)%64 != 0 {
		t.Fatalf("__versions of %s: %d bytes, %v", module, len(b), err)
	}
	uses := map[string]uint64{}
	for ; len(b) > 0; b = b[64:] {
		name, _, _ := bytes.Cut(b[8:64], []byte{0})
		uses[string(name)] = binary.LittleEndian.Uint64(b)
	}
	return uses
}

// unpacked is a folder with files of a package.
func unpacked(t *testing.T, k kerneltest.Kernel, name, pattern string) string {
	t.Helper()
	p, err := k.Maker.Archive.Find(t.Context(), name, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Maker.Archive.Download(t.Context(), []archive.Package{p}, k.Maker.Progress); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "klatch-e2e-package-") // where the unpacking user may look
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o755), sandbox.Own(dir), archive.Unpack(t.Context(), k.Maker.Archive.File(p), dir, pattern)); err != nil {
		t.Fatal(err)
	}
	return dir
}
