// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// Prune removes the partial tiles of a log's folder whose full tile is there
// and filled at this size: readers take the full one, and a partial one for
// each size that ever was would add up.
func Prune(dir string, size int64) error {
	return filepath.WalkDir(filepath.Join(dir, "tile"), func(path string, e fs.DirEntry, err error) error {
		full, partial := strings.CutSuffix(path, ".p")
		if err != nil || !e.IsDir() || !partial {
			return err
		}
		name, err := filepath.Rel(dir, full)
		if err != nil {
			return err
		}
		if _, err := os.Stat(full); err != nil || !isFull(filepath.ToSlash(name), size) {
			return fs.SkipDir //nolint:nilerr // without the full tile the partial ones stay
		}
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		return fs.SkipDir
	})
}

// isFull says whether a log of this size fills the tile of that name.
func isFull(name string, size int64) bool {
	name = strings.Replace(name, "tile/entries/", "tile/data/", 1)
	t, err := tlog.ParseTilePath("tile/8/" + strings.TrimPrefix(name, "tile/"))
	if err != nil || t.W != tileWidth {
		return false
	}
	level := max(t.L, 0)
	return level < 5 && (t.N+1)<<(tileHeight*(level+1)) <= size
}
