// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/changelog"
	"klatch/internal/forge/sandbox"
)

// smallPackage is built from the linux source package with its changelog, has
// no dependencies and 2 MB; package linux-source has 139 MB.
const smallPackage = "linux-libc-dev"

// Changelog gets the changelog of the linux source package that knows a
// version, and returns its file and the version that it was taken from. The
// newest one of the same stable line is taken: it holds the older uploads, and
// CVEs that were added to them afterwards. source names the package that is
// used when no small one is there, such as linux-source-6.1.
func (m Maker) Changelog(ctx context.Context, source, version string) (file, of string, err error) {
	p, err := m.withChangelog(ctx, source, version)
	if err != nil {
		return "", "", err
	}
	dir := filepath.Join(m.Cache, "sources", "changelog_"+p.Name+"_"+p.Version)
	file = filepath.Join(dir, "usr/share/doc", p.Name, "changelog.Debian.gz")
	if _, err := os.Stat(file); err == nil {
		return file, p.Version, nil
	}
	done := m.Step("get the changelog of linux " + p.Version)
	if err := m.Archive.Download(ctx, []archive.Package{p}, m.Progress); err != nil {
		return "", "", err
	}
	unlock, err := lock(filepath.Join(m.Cache, "sources"), filepath.Base(dir))
	if err != nil {
		return "", "", err
	}
	defer unlock() //nolint:errcheck // nothing was written
	part, err := os.MkdirTemp(filepath.Dir(dir), ".part-changelog-")
	if err != nil {
		return "", "", err
	}
	defer os.RemoveAll(part) //nolint:errcheck // scratch
	if err := os.Chmod(part, 0o755); err != nil {
		return "", "", err
	}
	if err := sandbox.Own(part); err != nil {
		return "", "", err
	}
	if err := archive.Unpack(ctx, m.Archive.File(p), part, "./usr/share/doc/*/changelog.Debian.gz"); err != nil {
		return "", "", fmt.Errorf("changelog of package %s %s: %w", p.Name, p.Version, err)
	}
	if err := errors.Join(os.RemoveAll(dir), os.Rename(part, dir)); err != nil {
		return "", "", err
	}
	done("")
	return file, p.Version, nil
}

func (m Maker) withChangelog(ctx context.Context, source, version string) (archive.Package, error) {
	series := seriesPattern.FindStringSubmatch(version)
	if series == nil {
		return archive.Package{}, fault.New(fault.Invalid, "bad_version", "package version %q has no series", version).
			WithHint("name a version of the linux source package, such as 6.1.190-1")
	}
	for _, name := range []string{smallPackage, source} {
		all, err := m.Archive.Versions(ctx, name)
		if err != nil {
			return archive.Package{}, err
		}
		var best archive.Package
		for _, p := range all {
			if s := seriesPattern.FindStringSubmatch(p.Version); s == nil || s[1] != series[1] {
				continue
			}
			c, err := changelog.Compare(p.Version, version)
			if err != nil {
				return archive.Package{}, err
			}
			if c < 0 {
				continue
			}
			if best.Name != "" {
				if c, err = changelog.Compare(p.Version, best.Version); err != nil {
					return archive.Package{}, err
				} else if c <= 0 {
					continue
				}
			}
			best = p
		}
		if best.Name != "" {
			return best, nil
		}
	}
	return archive.Package{}, fault.New(fault.NotFound, "no_version", "the archive has no package of linux %s or newer of line %s", version, series[1]).
		WithHint("name a version that the archive has: apt-cache madison linux-source-%s", series[1])
}
