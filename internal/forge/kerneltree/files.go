// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"klatch/internal/forge/archive"
	"klatch/internal/forge/sandbox"
)

// Files gets single files out of a version of a source package and returns
// the folder that holds them at their paths. The package's own tree is not
// unpacked; what was taken out once stays in the cache.
func (m Maker) Files(ctx context.Context, source, version string, files []string) (string, error) {
	p, err := m.Archive.Find(ctx, source, version)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(m.Cache, "sources", source+"_"+version)
	var missing []string
	for _, f := range files {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			missing = append(missing, f)
		}
	}
	if len(missing) == 0 {
		return dir, nil
	}
	if have, err := m.Archive.Missing([]archive.Package{p}); err != nil {
		return "", err
	} else if have > 0 {
		m.Say("source %s: %d MB to download", version, have/1_000_000)
	}
	done := m.Step("take " + strings.Join(missing, ", ") + " out of " + source + " " + version)
	if err := m.Archive.Download(ctx, []archive.Package{p}, m.Progress); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(m.Cache, "sources"), filepath.Base(dir))
	if err != nil {
		return "", err
	}
	defer unlock() //nolint:errcheck // nothing was written
	for _, d := range []string{dir, filepath.Join(dir, ".package")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
		if err := sandbox.Own(d); err != nil {
			return "", err
		}
	}
	tar := filepath.Join(dir, ".package", "usr/src", source+".tar.xz")
	if _, err := os.Stat(tar); err != nil {
		if err := archive.Unpack(ctx, m.Archive.File(p), filepath.Join(dir, ".package"), "./usr/src/linux-source-*.tar.xz"); err != nil {
			return "", err
		}
	}
	var members []string
	for _, f := range missing {
		members = append(members, source+"/"+f)
	}
	if err := archive.UnpackTar(ctx, tar, dir, members...); err != nil {
		return "", fmt.Errorf("source %s %s: %w", source, version, err)
	}
	done("")
	return dir, nil
}
