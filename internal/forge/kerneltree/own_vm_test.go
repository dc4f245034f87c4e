// SPDX-License-Identifier: Apache-2.0

//go:build vm

package kerneltree_test

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit/kerneltest"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// TestPartsOfAnOwnKernelMustBelongTogether spoils one part of a real kernel at
// a time.
func TestPartsOfAnOwnKernelMustBelongTogether(t *testing.T) {
	k := kerneltest.Own(t)
	file := func(name string, content []byte) string {
		p := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(p, content, 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	config := read(k.Parts.Config)
	for _, c := range []struct {
		name  string
		spoil func(*kerneltree.Own)
		code  fault.Code
	}{
		{"a stripped vmlinux", func(o *kerneltree.Own) {
			to := filepath.Join(t.TempDir(), "vmlinux")
			if out, err := exec.Command("strip", "-o", to, o.Vmlinux).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			o.Vmlinux = to
		}, "stripped"},
		{"one option is another", func(o *kerneltree.Own) {
			o.Config = file("config", append(bytes.Clone(config), "CONFIG_OF_NOBODY=y\n"...))
		}, "other_config"},
		{"a config of another compiler", func(o *kerneltree.Own) {
			o.Config = file("config", bytes.Replace(config, []byte("CONFIG_CC_VERSION_TEXT=\"gcc-12"), []byte("CONFIG_CC_VERSION_TEXT=\"gcc-13"), 1))
		}, "other_config"},
		{"no config", func(o *kerneltree.Own) { o.Config = "/nonexistent" }, "no_config"},
		{"source of another version", func(o *kerneltree.Own) {
			dir := t.TempDir()
			if err := os.MkdirAll(filepath.Join(dir, "scripts/livepatch"), 0o755); err != nil {
				t.Fatal(err)
			}
			makefile := strings.Replace(string(read(filepath.Join(o.Source, "Makefile"))), "PATCHLEVEL = ", "PATCHLEVEL = 9", 1)
			for name, content := range map[string]string{"Makefile": makefile, "scripts/livepatch/klp-build": ""} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			o.Source = dir
		}, "other_source"},
		{"source without klp-build", func(o *kerneltree.Own) { o.Source = t.TempDir() }, "no_klp_build"},
		{"another release", func(o *kerneltree.Own) { o.Release = "6.1.0-1-cloud-amd64" }, "other_release"},
		{"no compiler", func(o *kerneltree.Own) { o.CC = "gcc-of-nobody" }, "no_compiler"},
		{"another compiler", func(o *kerneltree.Own) {
			o.CC = file("cc", []byte("#!/bin/sh\necho 'gcc-12 (Debian 12.2.0-13) 12.2.0'\n"))
		}, "other_compiler"},
		{"an image of another build", func(o *kerneltree.Own) { o.Vmlinux = file("vmlinux", otherBuild(t, read(o.Vmlinux))) }, "symbols_mismatch"},
		{"a folder without modules", func(o *kerneltree.Own) { o.Modules = t.TempDir() }, "no_modules"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := k.Parts
			c.spoil(&o)
			m := kerneltree.Maker{Cache: t.TempDir(), Distro: kerneltree.OwnDistro,
				Step: func(string) func(string) { return func(string) {} }, Say: t.Logf}
			_, err := m.AddOwn(t.Context(), o)
			if fault.CodeOf(err) != c.code || fault.HintOf(err) == "" {
				t.Errorf("error %v with hint %q, want code %s", err, fault.HintOf(err), c.code)
			}
		})
	}
}

// otherBuild changes the build id inside a vmlinux.
func otherBuild(t *testing.T, vmlinux []byte) []byte {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		t.Fatal(err)
	}
	notes, err := f.Section(".notes").Data()
	if err != nil {
		t.Fatal(err)
	}
	// Elf64_Nhdr of type NT_GNU_BUILD_ID (3), then the name, then 20 bytes.
	i := bytes.Index(notes, []byte("\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00"))
	if i < 0 {
		t.Fatal("no build id")
	}
	vmlinux[f.Section(".notes").Offset+uint64(i)+16] ^= 0xff
	return vmlinux
}
