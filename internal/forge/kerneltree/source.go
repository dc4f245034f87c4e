// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"klatch/internal/durable"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/sandbox"
)

// FullSource unpacks a version of a source package, once, and returns its
// folder. It takes 1.6 GB of the cache; Files is for single files.
func (m Maker) FullSource(ctx context.Context, source, version string) (string, error) {
	p, err := m.Archive.Find(ctx, source, version)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(m.Cache, "sources", source+"_"+version+"_full")
	tree, marker := filepath.Join(dir, "tree"), filepath.Join(dir, "ready")
	unlock, err := lock(filepath.Join(m.Cache, "sources"), filepath.Base(dir))
	if err != nil {
		return "", err
	}
	defer unlock() //nolint:errcheck // nothing was written
	if _, err := os.Stat(marker); err == nil {
		return tree, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if have, err := m.Archive.Missing([]archive.Package{p}); err != nil {
		return "", err
	} else if have > 0 {
		m.Say("source %s: %d MB to download", version, have/1_000_000)
	}
	done := m.Step("unpack " + source + " " + version)
	if err := m.Archive.Download(ctx, []archive.Package{p}, m.Progress); err != nil {
		return "", err
	}
	if err := os.RemoveAll(dir); err != nil { // what a broken run left
		return "", err
	}
	pack := filepath.Join(dir, ".package")
	for _, d := range []string{dir, tree, pack} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
		if err := sandbox.Own(d); err != nil {
			return "", err
		}
	}
	if err := archive.Unpack(ctx, m.Archive.File(p), pack, "./usr/src/linux-source-*.tar.xz"); err != nil {
		return "", err
	}
	if err := archive.UnpackTar(ctx, filepath.Join(pack, "usr/src", source+".tar.xz"), tree); err != nil {
		return "", fmt.Errorf("source %s %s: %w", source, version, err)
	}
	if err := os.RemoveAll(pack); err != nil {
		return "", err
	}
	done("")
	return tree, durable.WriteFile(marker, nil, 0o644)
}
