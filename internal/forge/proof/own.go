// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/lab/story"
)

// Source is a story with where it comes from.
type Source struct {
	From  string // empty for ours; all, series/NAME, fix/CVE or file
	Story story.Story
	Taken []lab.File
	alone bool // named by a path: never part of the gate
}

// name is unique: a publisher's story may be called as one of ours is.
func (s Source) name() string {
	if s.From == "" {
		return s.Story.Name
	}
	return s.From + "/" + s.Story.Name
}

// Limits of the publisher's own stories.
const (
	maxOwn        = 500 // stories
	maxTaken      = 2000
	maxTakenBytes = 512 << 20 // they go into the guest's memory
)

// Own reads the publisher's stories for a livepatch: those for all, for its
// series, and for each of its fixes.
func Own(dataDir, series string, fixes []cve.ID) ([]Source, error) {
	from := []string{"all", "series/" + series}
	for _, id := range fixes {
		from = append(from, "fix/"+string(id))
	}
	var out []Source
	for _, f := range from {
		dir := filepath.Join(dataDir, "scenarios", filepath.FromSlash(f))
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // what cannot be read may be required
			return nil, err
		}
		for _, e := range entries {
			if filepath.Ext(e.Name()) != ".txtar" {
				continue
			}
			s, err := readSource(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			s.From = f
			out = append(out, s)
		}
		if len(out) > maxOwn {
			return nil, fault.New(fault.Invalid, "too_many_stories", "over %d stories below %s", maxOwn, filepath.Join(dataDir, "scenarios"))
		}
	}
	return out, nil
}

// File reads one story by its path. It is never part of the gate.
func File(path string) (Source, error) {
	s, err := readSource(path)
	s.From, s.alone = "file", true
	return s, err
}

func readSource(file string) (Source, error) {
	text, err := durable.ReadFile(file, story.MaxText+1)
	if err != nil {
		return Source{}, err
	}
	s, err := story.Parse(file, text, player.Grammar())
	if err != nil {
		return Source{}, err
	}
	taken, err := take(filepath.Dir(file), s.Take)
	if err != nil {
		return Source{}, fmt.Errorf("story %s: %w", file, err)
	}
	return Source{Story: s, Taken: taken}, nil
}

// take reads files and folders beside a story. Nothing leads out of its
// folder, symbolic links included.
func take(dir string, names []string) ([]lab.File, error) {
	if len(names) == 0 {
		return nil, nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // opened for reading only
	var out []lab.File
	var total int64
	for _, name := range names {
		err := fs.WalkDir(root.FS(), name, func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			info, err := root.Stat(p) // follows links, and refuses those that lead out
			if err != nil {
				return err
			}
			if !info.Mode().IsRegular() {
				return fmt.Errorf("take %s: not a file", p)
			}
			if total += info.Size(); total > maxTakenBytes || len(out) == maxTaken {
				return fault.New(fault.Invalid, "too_large", "it takes over %d bytes or %d files", maxTakenBytes, maxTaken)
			}
			out = append(out, lab.File{Name: p, Source: filepath.Join(dir, filepath.FromSlash(p)), Mode: info.Mode().Perm()})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Resolve turns what --scenario names into stories to play: paths are read,
// names are left to Run.
func Resolve(named []string) (only []string, extra []Source, err error) {
	for _, n := range named {
		if !strings.HasSuffix(n, ".txtar") {
			only = append(only, n)
			continue
		}
		s, err := File(n)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fault.New(fault.NotFound, "no_story", "there is no story %s", n).WithHint("klatch-forge test --list shows those by name")
		}
		if err != nil {
			return nil, nil, err
		}
		if slices.ContainsFunc(extra, func(o Source) bool { return o.name() == s.name() }) {
			return nil, nil, fault.New(fault.Invalid, "bad_story", "two stories are called %s", s.name())
		}
		only, extra = append(only, s.name()), append(extra, s)
	}
	return only, extra, nil
}
