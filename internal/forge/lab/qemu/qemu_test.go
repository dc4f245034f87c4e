// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"

	"klatch/internal/forge/lab"
)

func TestSmallGuestHoldsTheFiles(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("an agent"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := &Rig{cfg: Config{Guest: program, Busybox: program}}
	files := []lab.File{{Name: "a/b/c.ko", Data: []byte("module")}, {Name: "tool", Source: program, Mode: 0o755}}
	if err := r.writeSmallGuest(dir, files); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, initrdName))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for in := cpio.NewReader(bytes.NewReader(raw)); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = h.Mode.String() + " " + string(content)
	}
	for name, want := range map[string]string{
		"init": "0100755 an agent", "lab/a/b/c.ko": "0100644 module", "lab/tool": "0100755 an agent",
		"lab/a/b": "040755 ", ".klatch-lab-guest": "0100644 ",
	} {
		if got[name] != want {
			t.Errorf("%s: got %q, want %q", name, got[name], want)
		}
	}
}

func TestFilesStayInTheirFolder(t *testing.T) {
	for _, name := range []string{"", ".", "/etc/passwd", "../init", "a/../../init"} {
		r := &Rig{}
		if err := r.writeSmallGuest(t.TempDir(), []lab.File{{Name: name}}); err == nil {
			t.Errorf("%q was taken", name)
		}
	}
}

func TestOptions(t *testing.T) {
	for name, tt := range map[string]struct {
		o    option
		want string
	}{
		"emulation":         {accelTCG, "-accel tcg,thread=multi -cpu max"},
		"kvm":               {accelKVM, "-accel kvm -cpu host"},
		"size":              {size{memoryMiB: 256, cpus: 1}, "-m 256M -smp 1"},
		"comma in path":     {consoleFile("a,b"), "-chardev file,id=console,append=on,path=a,,b -device isa-serial,chardev=console,index=0"},
		"kernel last words": {boot{kernel: "k", commandLine: []string{"panic=1", "panic=0"}}, "-kernel k -append panic=1 panic=0"},
		"isolated":          {network{restricted: true}, "restrict=on"},
		"two disks":         {disks{{id: "a", file: "f", format: "raw"}, {id: "b", file: "g", format: "raw", readOnly: true}}, "format=raw,discard=unmap,readonly=on -device nvme-ns,bus=nvme0,nsid=2,drive=b"},
	} {
		if got := strings.Join(tt.o.args(), " "); !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want %q in it", name, got, tt.want)
		}
	}
}

func TestSpecIsChecked(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]lab.Spec{
		"no kernel":             {},
		"kernel missing":        {Kernel: file + "x"},
		"kernel is a folder":    {Kernel: filepath.Dir(file)},
		"root missing":          {Kernel: file, Root: file + "x"},
		"initrd without a root": {Kernel: file, Initrd: file},
	} {
		if err := checkSpec(s); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := checkSpec(lab.Spec{Kernel: file, Root: file}); err != nil {
		t.Error(err)
	}
}

func TestProbeResultIsForOneHost(t *testing.T) {
	r := &Rig{cfg: Config{Cache: t.TempDir()}}
	here := probeResult{HostKernel: "Linux version 1", Emulator: "QEMU 7"}
	if _, ok := r.cachedProbe(here); ok {
		t.Error("an empty cache knows")
	}
	kept := here
	kept.Accelerator, kept.Reason = accelTCG, "hangs"
	if err := r.keepProbe(kept); err != nil {
		t.Fatal(err)
	}
	if got, ok := r.cachedProbe(here); !ok || got != kept {
		t.Errorf("got %+v, %v", got, ok)
	}
	if _, ok := r.cachedProbe(probeResult{HostKernel: "Linux version 2", Emulator: "QEMU 7"}); ok {
		t.Error("another host's result is used")
	}
	if err := os.WriteFile(r.probeFile(here), []byte(`{"accel`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.cachedProbe(here); ok {
		t.Error("a torn file is used")
	}
}

func TestDynamicProgramsAreRefused(t *testing.T) {
	if err := mustBeStatic("/bin/sh"); err == nil {
		t.Skip("this machine's sh is static")
	}
	if _, err := New(Config{Program: "sh", Busybox: "sh", Guest: "/bin/sh"}); err == nil {
		t.Error("a dynamic program was taken as guest")
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var b tail
	for i := range 100 {
		_, _ = b.Write(slices.Repeat([]byte{byte('a' + i%26)}, 100))
	}
	if got := b.String(); len(got) != maxTail || got[len(got)-1] != byte('a'+99%26) {
		t.Errorf("%d bytes", len(got))
	}
}
