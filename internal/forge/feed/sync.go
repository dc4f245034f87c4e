// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
)

// Snapshot is a feed in the publisher's data folder. The list of them is
// reviewed text: decisions can name what they were made from. The content is
// not; it can be had again.
type Snapshot struct {
	Name     string `toml:"name"` // of the file below feeds/store
	Date     string `toml:"date"`
	SHA256   string `toml:"sha256"`
	Records  int    `toml:"records"`  // CVEs it speaks of
	Problems int    `toml:"problems"` // listed in feeds/store/NAME.problems
}

type index struct {
	Snapshots []Snapshot `toml:"feed"`
}

func indexFile(dir string) string    { return filepath.Join(dir, "feeds", "index.toml") }
func storeDir(dir string) string     { return filepath.Join(dir, "feeds", "store") }
func problemFile(kept string) string { return kept + ".problems" }

const maxIndex = 1 << 20

// Snapshots lists what the data folder has, by name.
func Snapshots(dir string) ([]Snapshot, error) {
	b, err := durable.ReadFile(indexFile(dir), maxIndex)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var x index
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&x); err != nil {
		return nil, fault.New(fault.Invalid, "bad_index", "read %s: %w", indexFile(dir), err)
	}
	for _, s := range x.Snapshots {
		if s.Name != filepath.Base(s.Name) || strings.HasPrefix(s.Name, ".") {
			return nil, fault.New(fault.Invalid, "bad_index", "read %s: feed %.60q is no file name", indexFile(dir), s.Name)
		}
	}
	return x.Snapshots, nil
}

// Load reads every snapshot of a data folder, and refuses one whose content is
// not the one that the list names.
func Load(dir string) (*Set, error) {
	all, err := Snapshots(dir)
	if err != nil {
		return nil, err
	}
	s := NewSet()
	for _, x := range all {
		p := filepath.Join(storeDir(dir), x.Name)
		got, err := archive.FileSHA256(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.NotFound, "no_feed", "feed %s of %s is listed and not here", x.Name, x.Date).
				WithHint("import it again: klatch-forge feed sync --from PATH --date %s", x.Date)
		}
		if err != nil {
			return nil, err
		}
		if got != x.SHA256 {
			return nil, fault.New(fault.Untrusted, "feed_digest", "feed %s has SHA-256 %s, the list says %s", x.Name, got, x.SHA256).
				WithHint("import it again: klatch-forge feed sync --from PATH")
		}
		if err := s.Read(p, x.Date); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Sync copies a feed into the data folder, after reading all of it. A folder
// of records becomes one file. A feed with no good record is refused; what
// else is kept aside is listed beside it. The snapshot of the same name is
// replaced, unless it is of a later day.
func Sync(dir, path, date string) (Snapshot, *Set, error) {
	from, err := sourceOf(path, date)
	if err != nil {
		return Snapshot{}, nil, err
	}
	s := NewSet()
	content, name, err := s.contentOf(path, from)
	if err != nil {
		return Snapshot{}, nil, err
	}
	if s.Len() == 0 {
		return Snapshot{}, s, fault.New(fault.Invalid, "bad_feed", "feed %s has no good record, %d bad", path, len(s.problems)+s.more).
			WithHint("the first: %s", firstProblem(s))
	}
	all, err := Snapshots(dir)
	if err != nil {
		return Snapshot{}, s, err
	}
	x := Snapshot{Name: name, Date: from.Date, Records: s.Len(), Problems: len(s.problems) + s.more}
	if i := slices.IndexFunc(all, func(o Snapshot) bool { return o.Name == name }); i >= 0 {
		if all[i].Date > x.Date {
			return x, s, fault.New(fault.Conflict, "feed_older", "feed %s is of %s, the data folder has that of %s", name, x.Date, all[i].Date).
				WithHint("say --date if the file is newer than its time stamp")
		}
		all = slices.Delete(all, i, i+1)
	}
	if err := os.MkdirAll(storeDir(dir), 0o755); err != nil {
		return x, s, err
	}
	kept := filepath.Join(storeDir(dir), name)
	for _, w := range []struct {
		path    string
		content []byte
	}{
		{filepath.Join(dir, "feeds", ".gitignore"), []byte("/store/\n")},
		{kept, content}, {problemFile(kept), s.problemText()},
	} {
		if err := durable.WriteFile(w.path, w.content, 0o644); err != nil {
			return x, s, err
		}
	}
	if x.SHA256, err = archive.FileSHA256(kept); err != nil {
		return x, s, err
	}
	all = append(all, x)
	slices.SortFunc(all, func(a, b Snapshot) int { return cmp.Compare(a.Name, b.Name) })
	b, err := toml.Marshal(index{all})
	if err != nil {
		return x, s, err
	}
	return x, s, durable.WriteFile(indexFile(dir), b, 0o644)
}

// contentOf reads a feed into the set and returns the bytes to keep.
func (s *Set) contentOf(path string, from cve.Source) ([]byte, string, error) {
	folder, err := isFolder(path)
	if err != nil {
		return nil, "", err
	}
	if folder {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		enc := json.NewEncoder(z)
		err := s.readFolderLines(path, from, func(l line) error { return enc.Encode(l) })
		err = errors.Join(err, z.Close())
		return b.Bytes(), CNA + ".jsonl.gz", err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	b, err := durable.ReadLimited(f, path, maxBytes)
	if err != nil {
		return nil, "", err
	}
	name := filepath.Base(path)
	return b, name, s.read(io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b))), name, from)
}

func firstProblem(s *Set) string {
	if len(s.problems) == 0 {
		return "it is empty"
	}
	return s.problems[0].String()
}

func (s *Set) problemText() []byte {
	var b bytes.Buffer
	for _, p := range s.problems {
		fmt.Fprintln(&b, p)
	}
	if s.more > 0 {
		fmt.Fprintf(&b, "%d more\n", s.more)
	}
	return b.Bytes()
}
