// SPDX-License-Identifier: Apache-2.0

package facts

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strings"

	debversion "github.com/knqyf263/go-deb-version"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// Kernels are the releases installed in /boot, newest first.
type Kernels []kernel.Release

// Kernels lists the installed kernels. An empty or unreadable /boot is an
// error: it may be a file system that is not mounted, and then nobody knows
// what the next boot runs.
func (m Machine) Kernels() (Kernels, error) {
	unknown := func(format string, args ...any) (Kernels, error) {
		return nil, fault.New(fault.Internal, "kernels_unknown", format, args...).
			WithHint("check that the boot file system is mounted: ls /boot")
	}
	entries, err := os.ReadDir(m.path("boot"))
	if err != nil {
		return unknown("list installed kernels: %w", err)
	}
	var ks Kernels
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), "vmlinuz-")
		if !ok || slices.Contains(notKernels, filepath.Ext(name)) {
			continue
		}
		if r, err := kernel.ParseRelease(name); err == nil {
			ks = append(ks, r)
		}
	}
	if len(ks) == 0 {
		return unknown("list installed kernels: no vmlinuz-* in %s", m.path("boot"))
	}
	slices.SortFunc(ks, func(a, b kernel.Release) int { return CompareReleases(b, a) })
	return ks, nil
}

// notKernels are endings of copies that boot loaders leave out too
// (grub-mkconfig, grub_file_is_not_garbage).
var notKernels = []string{".old", ".dpkg-new", ".dpkg-old", ".dpkg-dist", ".dpkg-tmp", ".rpmsave", ".rpmnew", ".sig"}

// Newer is the newest installed release if it is newer than the running one;
// empty otherwise.
func (ks Kernels) Newer(running kernel.Release) kernel.Release {
	if len(ks) > 0 && CompareReleases(ks[0], running) > 0 {
		return ks[0]
	}
	return ""
}

// CompareReleases orders kernel releases as boot loaders do: by version, with
// a release candidate before its release. The comparison is Debian's
// (deb-version(7)), where "~" sorts before everything.
func CompareReleases(a, b kernel.Release) int {
	va, errA := debversion.NewVersion(sortKey(a))
	vb, errB := debversion.NewVersion(sortKey(b))
	if errA != nil || errB != nil {
		return cmp.Compare(a, b)
	}
	return va.Compare(vb)
}

func sortKey(r kernel.Release) string {
	// A hyphen in front of a "rc" word would sort it after the release; an
	// underscore is no letter of Debian versions.
	return strings.NewReplacer("-rc", "~rc", "_", ".").Replace(string(r))
}
