// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/fault"
)

// tree writes files, by name.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestCopyLeavesOutKeysHistoryAndObjects(t *testing.T) {
	from := tree(t, map[string]string{
		"Makefile": "VERSION = 7\n", "kernel/fork.c": "int x;\n", ".git/config": "x", "kernel/fork.o": "x", "kernel/.fork.o.cmd": "x",
		"vmlinux": "x", "drivers/vmlinux": "kept", "certs/signing_key.pem": "x", "certs/extract-cert.c": "int y;\n",
		"my/key.pem": "-----BEGIN PRIVATE KEY-----\n", "my/cert.pem": "-----BEGIN CERTIFICATE-----\n", "include/generated/autoconf.h": "x",
		"scripts/run": "#!/bin/sh\n", ".config": "x",
	})
	for link, to := range map[string]string{"inside": "kernel/fork.c", "kernel/up": "../Makefile", "outside": "../secret", "absolute": "/etc/shadow"} {
		if err := os.Symlink(to, filepath.Join(from, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(from, "scripts/run"), 0o700); err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	digest, n, err := copySource(from, to)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	err = filepath.WalkDir(to, func(p string, d os.DirEntry, err error) error {
		if !d.IsDir() {
			rel, _ := filepath.Rel(to, p)
			have = append(have, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"Makefile", "certs/extract-cert.c", "drivers/vmlinux", "inside", "kernel/fork.c", "kernel/up", "my/cert.pem", "scripts/run"}
	if slices.Sort(have); !slices.Equal(have, want) {
		t.Errorf("copied %q, want %q", have, want)
	}
	if n < 6 {
		t.Errorf("%d files", n)
	}
	if st, err := os.Stat(filepath.Join(to, "scripts/run")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("a program became %v, %v", st, err)
	}
	again, _, err := copySource(from, t.TempDir())
	if err != nil || again != digest {
		t.Errorf("digests %s, %s, %v", digest, again, err)
	}
	if err := os.WriteFile(filepath.Join(from, "kernel/fork.c"), []byte("int z;\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if other, _, err := copySource(from, t.TempDir()); err != nil || other == digest {
		t.Errorf("another source has the same digest, %v", err)
	}
}

const goodConfig = "CONFIG_CC_VERSION_TEXT=\"gcc-12 (Debian 12.2.0-14) 12.2.0\"\nCONFIG_MODULES=y\nCONFIG_SYSFS=y\n" +
	"CONFIG_KALLSYMS_ALL=y\nCONFIG_LIVEPATCH=y\nCONFIG_KLP_BUILD=y\n"

func TestConfigMustBeThatOfAKernelThatCanBeLivepatched(t *testing.T) {
	id := identity{banner: "Linux version 7.3.4-own (me@here) (gcc-12 (Debian 12.2.0-14) 12.2.0, GNU ld 2.40) #1 SMP"}
	for _, c := range []struct {
		name   string
		config string
		inside string
		code   fault.Code
		says   string
	}{
		{"a good one", goodConfig, "", "", ""},
		{"the one inside vmlinux", goodConfig, goodConfig, "", ""},
		{"one made for another compiler", strings.Replace(goodConfig, "12.2.0\"", "12.3.0\"", 1), "", "other_config", "12.3.0"},
		{"not the one inside vmlinux", goodConfig + "CONFIG_HZ=250\n", goodConfig + "CONFIG_HZ=1000\n", "other_config", "CONFIG_HZ is 1000 there, 250 here"},
		{"without livepatches", strings.Replace(goodConfig, "CONFIG_LIVEPATCH=y\nCONFIG_KLP_BUILD=y\n", "", 1), "", "not_livepatchable", "CONFIG_LIVEPATCH, CONFIG_KLP_BUILD"},
		{"with random structure layout", goodConfig + "CONFIG_GCC_PLUGIN_RANDSTRUCT=y\n", "", "not_livepatchable", "RANDSTRUCT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var inside []byte
			if c.inside != "" {
				inside = []byte(c.inside)
			}
			err := checkConfig([]byte(c.config), id, inside, ".config")
			if fault.CodeOf(err) != c.code || c.code != "" && (!strings.Contains(err.Error(), c.says) || fault.HintOf(err) == "") {
				t.Errorf("error %v, want code %q that says %q", err, c.code, c.says)
			}
		})
	}
}

func TestKeysOfTheOwnerAreNotNeeded(t *testing.T) {
	got := string(withoutKeys([]byte("CONFIG_A=y\nCONFIG_MODULE_SIG_KEY=\"/root/my.pem\"\nCONFIG_SYSTEM_TRUSTED_KEYS=\"debian/certs/all.pem\"\n# CONFIG_B is not set\n")))
	want := "CONFIG_A=y\nCONFIG_MODULE_SIG_KEY=\"certs/signing_key.pem\"\nCONFIG_SYSTEM_TRUSTED_KEYS=\"\"\n# CONFIG_B is not set\n"
	if got != want {
		t.Errorf("got %q", got)
	}
}

func TestSourceSaysItsVersion(t *testing.T) {
	dir := tree(t, map[string]string{"Makefile": "# SPDX\nVERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\nEXTRAVERSION =\nNAME = Baby\n\nfoo:\n\tVERSION = 9\n",
		"rc": "VERSION = 8\nPATCHLEVEL = 0\nSUBLEVEL = 0\nEXTRAVERSION = -rc2\n", "none": "all:\n"})
	for name, want := range map[string]string{"Makefile": "7.3.4", "rc": "8.0.0-rc2", "none": ""} {
		got, err := sourceVersion(filepath.Join(dir, name))
		if got != want || (want == "") != (err != nil) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestBuiltTreeSaysWhatItIsMadeOf(t *testing.T) {
	files := map[string]string{
		"net/.a.o.cmd":               "savedcmd_net/a.o := gcc -c -o net/a.o net/a.c\n\nsource_net/a.o := net/a.c\n\ndeps_net/a.o := \\\n    $(wildcard include/config/NET) \\\n  include/net/a.h \\\n  /usr/lib/x.h \\\n\nnet/a.o: $(deps_net/a.o)\n",
		"net/.both.o.cmd":            "savedcmd_net/both.o := ld -r -o net/both.o @net/both.mod\n",
		"net/.b.o.cmd":               "savedcmd_net/b.o := gcc\n\nsource_net/b.o := net/b.c\n\ndeps_net/b.o := \\\n  include/net/b.h \\\n",
		"net/.both.mod.o.cmd":        "savedcmd_net/both.mod.o := gcc\n\nsource_net/both.mod.o := net/both.mod.c\n\ndeps_net/both.mod.o := \\\n",
		"net/both.mod":               "net/b.o\n",
		"scripts/.mod.o.cmd":         "source_scripts/mod.o := scripts/mod.c\n",
		"klp-tmp/5-kmod/.init.o.cmd": "source_x := klp-tmp/5-kmod/init.c\n",
	}
	for i := range 120 {
		n := "kernel/f" + string(rune('a'+i/26)) + string(rune('a'+i%26))
		files["kernel/."+filepath.Base(n)+".o.cmd"] = "savedcmd_" + n + ".o := gcc\n\nsource_" + n + ".o := " + n + ".c\n\ndeps_" + n + ".o := \\\n"
	}
	units, sources, err := readBuilt(tree(t, files))
	if err != nil {
		t.Fatal(err)
	}
	var net []Unit
	for _, u := range units.Units {
		if strings.HasPrefix(u.Source, "net/") {
			net = append(net, u)
		}
	}
	if want := []Unit{{"net/a.c", "vmlinux", "net/a.o"}, {"net/b.c", "both", "net/b.o"}}; !slices.Equal(net, want) {
		t.Errorf("units %+v", net)
	}
	if !slices.Equal(units.Modules, []Module{{"both", "net/both.ko"}}) {
		t.Errorf("modules %+v", units.Modules)
	}
	if !slices.Contains(sources, "include/net/a.h") || slices.Contains(sources, "scripts/mod.c") || !slices.IsSorted(sources) {
		t.Errorf("sources %q", sources)
	}
}
