// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// Prune removes the partial tiles of a log's folder whose full tile is there
// and filled at this size: readers take the full one, and a partial one for
// each size that ever was would add up.
func Prune(dir string, size int64) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // nothing is written through it
	var obsolete []string
	err = fs.WalkDir(root.FS(), "tile", func(name string, e fs.DirEntry, err error) error {
		full, partial := strings.CutSuffix(name, ".p")
		if err != nil || !e.IsDir() || !partial {
			return err
		}
		if st, err := root.Stat(full); err == nil && st.Mode().IsRegular() && isFull(full, size) {
			obsolete = append(obsolete, name)
		}
		return fs.SkipDir
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // an empty log has no tile
		return err
	}
	for _, name := range obsolete {
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// Obsolete is Prune for a folder that somebody else lists: of the names below
// it, those of partial tiles whose full tile is among them and filled.
func Obsolete(names []string, size int64) []string {
	var obsolete []string
	for _, name := range names {
		full, _, partial := strings.Cut(name, ".p/")
		if partial && slices.Contains(names, full) && isFull(full, size) {
			obsolete = append(obsolete, name)
		}
	}
	return obsolete
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
