// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"errors"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/buildroot"
	"klatch/internal/forge/catalog"
	"klatch/internal/kernel"
)

func TestKernelOfAnotherReleaseIsRefused(t *testing.T) {
	for release, distro := range map[string]kernel.Distro{
		"6.12.118+deb13-cloud-amd64":   "debian-13",
		"6.12.115+deb13.1-cloud-amd64": "debian-13",
		"6.12.117+deb12-cloud-amd64":   "debian-12",
	} {
		other := kernel.Distro("debian-12")
		if distro == other {
			other = "debian-13"
		}
		if err := (Maker{Distro: distro}).ours(kernel.Release(release)); err != nil {
			t.Errorf("%s on %s: %v", release, distro, err)
		}
		_, err := (Maker{Distro: other}).resolve(t.Context(), kernel.Release(release), "") // before the archive is asked
		f, ok := errors.AsType[*fault.Error](err)
		if !ok || f.Kind != fault.Invalid || !strings.Contains(f.Hint, "--distro "+string(distro)) {
			t.Errorf("%s on %s: %v", release, other, err)
		}
	}
	if err := (Maker{Distro: "debian-12"}).ours("6.1.0-50-cloud-amd64"); err != nil {
		t.Error(err)
	}
}

func TestCompilerOfDebian(t *testing.T) {
	for said, want := range map[string]string{
		"x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0": "gcc-14 14.2.0-19",
		"gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0":          "gcc-12 12.2.0-14+deb12u1",
		"gcc (GCC) 14.2.1 20240801":                         "",
		"clang version 18.1.8":                              "",
	} {
		got := ""
		if f := debianCompiler.FindStringSubmatch(said); f != nil {
			got = f[1] + " " + f[2]
		}
		if got != want {
			t.Errorf("%q: %q, want %q", said, got, want)
		}
	}
	if !SameCompiler("gcc-14 (Debian 14.2.0-19) 14.2.0", "x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0") {
		t.Error("the name by which a compiler is called makes a difference")
	}
	if SameCompiler("gcc-14 (Debian 14.2.0-18) 14.2.0", "gcc-14 (Debian 14.2.0-19) 14.2.0") {
		t.Error("another build of a compiler is the same")
	}
}

// A kernel that no gcc of Debian made has no root folder; it is said before
// anything is downloaded.
func TestForeignCompilerHasNoRootFolder(t *testing.T) {
	spec := buildroot.Debian13()
	_, err := (Maker{Root: &spec}).root(t.Context(), &catalog.Entry{Release: "6.12.1", Compiler: "clang version 18.1.8"})
	if fault.KindOf(err) != fault.Invalid {
		t.Errorf("error %v", err)
	}
}

func TestEntryWithoutRootFolderUsesTheHost(t *testing.T) {
	if r, err := RootOf(t.TempDir(), catalog.Entry{}); err != nil || r.Dir != "" {
		t.Errorf("%+v, %v", r, err)
	}
	_, err := RootOf(t.TempDir(), catalog.Entry{Buildroot: "debian-13", Toolchain: map[string]string{"gcc-14": "14.2.0-19"}})
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "gcc-14 14.2.0-19") {
		t.Errorf("a root folder that is not there: %v", err)
	}
}
