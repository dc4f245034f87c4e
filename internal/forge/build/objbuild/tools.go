// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"context"
	"os"
	"path/filepath"

	"klatch/internal/forge/archive"
	"klatch/internal/forge/sandbox"
)

// Tools are the programs of Debian's kpatch-build package, unpacked into the
// cache; nothing is installed.
type Tools struct {
	Dir     string // holds usr/lib/kpatch and usr/share/kpatch
	Package archive.Package
}

func (t Tools) program(name string) string { return filepath.Join(t.Dir, "usr/lib/kpatch", name) }

func (t Tools) template(name string) string {
	return filepath.Join(t.Dir, "usr/share/kpatch/patch", name)
}

// Version names the tools in a plan.
func (t Tools) Version() map[string]string {
	return map[string]string{t.Package.Name: t.Package.Version + " " + t.Package.SHA256, "objbuild": "3"}
}

// FetchTools makes the tools ready in the cache.
func FetchTools(ctx context.Context, a *archive.Archive, cache string, progress archive.Progress) (Tools, error) {
	p, err := a.Find(ctx, "kpatch-build", "")
	if err != nil {
		return Tools{}, err
	}
	t := Tools{Dir: filepath.Join(cache, "tools", "kpatch-build-"+p.Version), Package: p}
	if _, err := os.Stat(t.Dir); err == nil {
		return t, nil
	}
	if err := a.Download(ctx, []archive.Package{p}, progress); err != nil {
		return t, err
	}
	if err := os.MkdirAll(filepath.Dir(t.Dir), 0o755); err != nil {
		return t, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(t.Dir), ".unpack-")
	if err != nil {
		return t, err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // gone after the rename
	if err := os.Chmod(tmp, 0o755); err != nil {
		return t, err
	}
	if err := sandbox.Own(tmp); err != nil {
		return t, err
	}
	if err := archive.Unpack(ctx, a.File(p), tmp); err != nil {
		return t, err
	}
	return t, os.Rename(tmp, t.Dir)
}
