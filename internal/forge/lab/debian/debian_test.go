// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSourceComesFromApt(t *testing.T) {
	const targets = "trixie\ttrixie\thttp://one.example/debian\t$(SIGNED_BY)\n" +
		"bookworm-security\tbookworm-security\thttp://two.example/security\t/usr/share/keyrings/k.gpg\n" +
		"bookworm\toldstable\thttp://three.example/debian\t/usr/share/keyrings/k.gpg\n" +
		"forky\tforky\t$(SITE)\t\n" +
		"sid\tsid\thttp://four.example/debian\tABCDEF0123456789\n"
	for suite, want := range map[string]source{
		"bookworm":  {"http://three.example/debian", "/usr/share/keyrings/k.gpg"},
		"oldstable": {"http://three.example/debian", "/usr/share/keyrings/k.gpg"},
		"trixie":    {"http://one.example/debian", ""},
		"sid":       {"http://four.example/debian", ""},
	} {
		if got, err := parseTargets([]byte(targets), suite); err != nil || got != want {
			t.Errorf("%s: got %+v, %v", suite, got, err)
		}
	}
	for _, suite := range []string{"forky", "bullseye"} {
		if got, err := parseTargets([]byte(targets), suite); err == nil {
			t.Errorf("%s: got %+v", suite, got)
		}
	}
}

func TestRecipeDecidesTheImage(t *testing.T) {
	deb := filepath.Join(t.TempDir(), "k.deb")
	digest := func(content string, cfg Config) string {
		t.Helper()
		if err := os.WriteFile(deb, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		cfg.KernelDeb, cfg.Cache = deb, t.TempDir()
		r, err := newRecipe(cfg)
		if err != nil {
			t.Fatal(err)
		}
		d, err := r.digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	base := digest("a", Config{Suite: "s", Packages: []string{"x", "y"}})
	if got := digest("a", Config{Suite: "s", Packages: []string{"y", "x", "x"}}); got != base {
		t.Error("order of the packages changes the digest")
	}
	for name, got := range map[string]string{
		"kernel":  digest("b", Config{Suite: "s", Packages: []string{"x", "y"}}),
		"suite":   digest("a", Config{Suite: "t", Packages: []string{"x", "y"}}),
		"package": digest("a", Config{Suite: "s", Packages: []string{"x"}}),
	} {
		if got == base {
			t.Errorf("another %s gives the same digest", name)
		}
	}
}

func TestAnImageWithAMissingFileIsNotUsed(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{aboutName: `{"release":"6.1"}`, rootName: "", kernelName: ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if img, err := open(dir, "d"); err != nil || img.Release != "6.1" || img.Initrd != "" {
		t.Errorf("complete image: %+v, %v", img, err)
	}
	if err := os.Remove(filepath.Join(dir, rootName)); err != nil {
		t.Fatal(err)
	}
	if _, err := open(dir, "d"); err == nil {
		t.Error("an image without its disk was opened")
	}
}

func TestKernelsThatNeedAnInitramfs(t *testing.T) {
	for config, want := range map[string]bool{
		"#\nCONFIG_BLK_DEV_NVME=y\nCONFIG_EXT4_FS=y\n":            true,
		"#\nCONFIG_BLK_DEV_NVME=m\nCONFIG_EXT4_FS=y\n":            false,
		"#\nCONFIG_BLK_DEV_NVME=y\n# CONFIG_EXT4_FS is not set\n": false,
	} {
		if got := bootsAlone([]byte(config)); got != want {
			t.Errorf("%q: got %v", config, got)
		}
	}
}
