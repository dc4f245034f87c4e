// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/efi"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/trustsign"
)

// The programs of Debian's packages shim-signed and grub-efi-amd64-signed, and
// the firmware variables with Microsoft's keys of package ovmf.
const (
	shim        = "/usr/lib/shim/shimx64.efi.signed"
	grub        = "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
	soldMachine = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"
)

// way is a small guest, in which a module meets the kernel without our
// programs; only the verdict before a download is asked of ours.
type way struct {
	lab.Machine
	t *testing.T
}

// byOtherWays is the rest of group V: other ways in which a kernel comes to ask
// for signatures, or does not.
func byOtherWays(t *testing.T, p, stranger *securePublisher) {
	w := &way{t: t}
	sub := func(name string, f func(t *testing.T)) {
		t.Run("V/"+name, func(t *testing.T) {
			w.t = t
			began := time.Now()
			f(t)
			t.Logf("%s: %.1f s", name, time.Since(began).Seconds())
		})
	}
	boot := func(name string, f *lab.Firmware, words ...string) {
		w.t.Helper()
		var err error
		if w.Machine, err = p.made.rig.Boot(w.t.Context(), wayThere(t, name, p, stranger, f, words)); err != nil {
			w.t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := w.Close(); err != nil {
				t.Error(err)
			}
		})
		w.variables()
	}
	again := func(words ...string) {
		w.t.Helper()
		w.Machine.(lab.Tunable).Append(words...)
		if err := w.Reset(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
		w.variables()
	}

	sub("no Secure Boot, module.sig_enforce=1", func(*testing.T) {
		boot("enforced", &lab.Firmware{Variables: []efi.Variable{efi.DB(p.cert)}}, "module.sig_enforce=1")
		w.verdict(bootkeys.Trusted, "module_key_enrolled", bootkeys.Off)
		w.kernelSays("unsigned", rejected)
		w.kernelSays("foreign", rejected)
		w.live()
	})
	sub("SHA-512 that is a module of the kernel", func(t *testing.T) {
		// No file system has it here: the signature is good, and nobody can tell.
		w.kernelSays("sha512", rejected)
		if got := w.sh("dmesg | tail -3"); !strings.Contains(got, "unsupported crypto") {
			t.Errorf("the kernel says %s", got)
		}
	})
	sub("lockdown=confidentiality", func(*testing.T) {
		again("lockdown=confidentiality")
		w.verdict(bootkeys.Trusted, "module_key_enrolled", bootkeys.Off)
		w.kernelSays("unsigned", locked)
		w.kernelSays("foreign", locked)
		w.live()
	})
	sub("no enforcement", func(t *testing.T) {
		again()
		w.verdict(bootkeys.NotEnforced, "module_key_not_asked", bootkeys.Off)
		w.kernelSays("foreign", taken)
		if got := w.sh("cat /proc/sys/kernel/tainted"); got != "45056" {
			t.Errorf("taint %s, want 45056: a livepatch, not verified", got)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	})
	sub("owner's key by MOK, through shim and GRUB", func(*testing.T) {
		boot("mok", &lab.Firmware{Store: soldMachine, Shim: shim, Grub: grub, Variables: []efi.Variable{efi.MOK(p.cert)}})
		w.verdict(bootkeys.Trusted, "module_key_enrolled", bootkeys.On)
		w.kernelSays("unsigned", rejected)
		w.kernelSays("foreign", rejected)
		w.live()
	})
	sub("kernel by kexec", func(t *testing.T) {
		before := w.BootID()
		w.sh("cd / && find . -xdev | cpio -o -H newc > /tmp/initrd 2>/dev/null")
		line := w.sh("cat /proc/cmdline") + " klatch.kexec=1"
		// It does not answer: another kernel is there when it would.
		res, err := w.Run(t.Context(), lab.Command{Argv: []string{lab.FilesDir + "/klatch-hostile", "kexec", lab.FilesDir + "/vmlinuz", "/tmp/initrd", line}, Timeout: 3 * time.Minute})
		if err == nil {
			t.Fatalf("kexec came back: status %d, timed out %v: %s%s", res.Exit, res.TimedOut, res.Stdout, res.Stderr)
		}
		if err := w.Await(t.Context(), before); err != nil {
			t.Fatal(err)
		}
		w.variables()
		if got := w.sh("cat /proc/cmdline"); !strings.HasSuffix(got, "klatch.kexec=1") {
			t.Fatalf("command line %s", got)
		}
		w.verdict(bootkeys.Trusted, "module_key_enrolled", bootkeys.On)
		w.kernelSays("unsigned", rejected)
		w.kernelSays("foreign", rejected)
		w.live()
	})
}

func wayThere(t *testing.T, name string, p, stranger *securePublisher, f *lab.Firmware, words []string) lab.Spec {
	t.Helper()
	raw, _ := p.made.module(t, 1)
	anchor, err := trustsign.Anchor(*p.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	files := []lab.File{
		{Name: "klatch-hostile", Source: p.made.bin + "/klatch-hostile", Mode: 0o755},
		{Name: "klatch-look", Source: p.made.bin + "/klatch-look", Mode: 0o755},
		{Name: "check", Source: p.made.bin + "/cve-2026-52928", Mode: 0o755},
		{Name: "vmlinuz", Source: p.made.image.Kernel},
		{Name: "trust.json", Data: anchor},
		{Name: "efivarfs.ko", Source: p.made.kernel.Tree.Dir + "/modules/efivarfs.ko"},
		{Name: "good.ko", Data: p.signModule(raw)},
		{Name: "unsigned.ko", Data: raw},
		{Name: "foreign.ko", Data: stranger.signModule(raw)},
		{Name: "sha512.ko", Data: p.signFile(raw, "sha512", p.Module, p.cert)},
	}
	return lab.Spec{Name: name, Kernel: p.made.image.Kernel, Firmware: f, Append: words, Files: files, MemoryMiB: 1024}
}

func (w *way) sh(script string) string {
	w.t.Helper()
	res, err := w.Run(w.t.Context(), lab.Command{Argv: []string{"sh", "-c", script}})
	if err != nil || res.Exit != 0 {
		w.t.Fatalf("%s: status %d, %v\n%s%s", script, res.Exit, err, res.Stdout, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

// variables mounts the firmware's, with the distribution's own module.
func (w *way) variables() {
	w.t.Helper()
	w.kernelSays("efivarfs", taken)
	w.sh("mount -t efivarfs none /sys/firmware/efi/efivars")
}

func (w *way) kernelSays(name, want string) {
	w.t.Helper()
	if got := w.sh(lab.FilesDir + "/klatch-hostile errno " + lab.FilesDir + "/" + name + ".ko"); got != want {
		w.t.Errorf("the kernel answers %s to %s, want %s", got, name, want)
	}
}

// live loads the publisher's livepatch and sees its effect.
func (w *way) live() {
	w.t.Helper()
	flaw := func() bool {
		res, err := w.Run(w.t.Context(), lab.Command{Argv: []string{lab.FilesDir + "/check"}})
		if err != nil || res.Exit > 1 {
			w.t.Fatalf("check: status %d, %v\n%s%s", res.Exit, err, res.Stdout, res.Stderr)
		}
		return res.Exit == 1
	}
	before := flaw()
	w.sh(lab.FilesDir + "/klatch-hostile insmod " + lab.FilesDir + "/good.ko klatch_1") // ends with the transition
	if after := flaw(); !before || after {
		w.t.Errorf("the flaw shows before: %v, after: %v", before, after)
	}
}

// verdict is what klatchd would say before a download.
func (w *way) verdict(word bootkeys.Word, code fault.Code, secure bootkeys.Switch) {
	w.t.Helper()
	var v bootkeys.Verdict
	if err := json.Unmarshal([]byte(w.sh(lab.FilesDir+"/klatch-look keys "+lab.FilesDir+"/trust.json")), &v); err != nil {
		w.t.Fatal(err)
	}
	if v.Word != word || v.Code != code || v.SecureBoot != secure {
		w.t.Errorf("verdict %+v, want %s, %s, Secure Boot %s", v, word, code, secure)
	}
}
