// SPDX-License-Identifier: Apache-2.0

// Package headers answers one question about a kernel tree: which source
// files can change when a header, or another file that is included, changes?
//
// It reads text, not preprocessor output: every #include counts, also those
// that this configuration skips, so the answer is too large rather than too
// small. Affected then narrows it by the names that the change defines and by
// all names that are defined with them.
package headers

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Graph says what includes what. Paths are relative to the tree.
type Graph struct {
	Includes map[string][]string `json:"includes"` // of each file, direct

	tree     string
	included map[string][]string // the other way round
	units    map[string]bool
	items    map[string][]item
	hashes   map[string][]uint32
}

const (
	maxSource = 8 << 20  // of one file, in bytes; amdgpu's largest register header has 6 MiB
	maxGraph  = 64 << 20 // of the stored graph
	maxFiles  = 100_000  // of the graph
)

// searched are the folders that all files of an x86 kernel are searched in
// (Makefile, LINUXINCLUDE).
var searched = []string{"include", "arch/x86/include", "arch/x86/include/generated", "include/uapi", "arch/x86/include/uapi",
	"arch/x86/include/generated/uapi", "include/generated/uapi"}

var include = regexp.MustCompile(`(?m)^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]`)

// Load reads the graph that is stored in file, or makes it from the tree and
// stores it. units are the source files that the kernel was compiled from.
func Load(tree, file string, units []string) (*Graph, error) {
	g := &Graph{tree: tree, units: map[string]bool{}, items: map[string][]item{}, hashes: map[string][]uint32{}}
	for _, u := range units {
		g.units[u] = true
	}
	b, err := durable.ReadFile(file, maxGraph)
	if err == nil {
		err = json.Unmarshal(b, g)
	}
	if err != nil || g.Includes == nil {
		if err := g.read(units); err != nil {
			return nil, err
		}
		b, err := json.Marshal(g)
		if err != nil {
			return nil, err
		}
		if err := durable.WriteFile(file, b, 0o644); err != nil {
			return nil, err
		}
	}
	g.included = map[string][]string{}
	for _, from := range sorted(g.Includes) {
		for _, to := range g.Includes[from] {
			g.included[to] = append(g.included[to], from)
		}
	}
	return g, nil
}

func sorted[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// read follows the includes of all units.
func (g *Graph) read(units []string) error {
	byBase, err := g.bases()
	if err != nil {
		return err
	}
	g.Includes = map[string][]string{}
	todo := slices.Clone(units)
	for len(todo) > 0 {
		f := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, done := g.Includes[f]; done {
			continue
		}
		if len(g.Includes) > maxFiles {
			return fault.New(fault.Invalid, "tree_too_large", "over %d files are compiled or included", maxFiles)
		}
		text, err := g.text(f)
		if err != nil {
			return err
		}
		to := []string{}
		for _, m := range include.FindAllSubmatch(text, -1) {
			to = append(to, g.resolve(f, string(m[2]), m[1][0] == '"', byBase)...)
		}
		slices.Sort(to)
		g.Includes[f] = slices.Compact(to)
		todo = append(todo, g.Includes[f]...)
	}
	return nil
}

// bases lists all headers, and sources that might be included, by their last
// path element.
func (g *Graph) bases() (map[string][]string, error) {
	all := map[string][]string{}
	err := filepath.WalkDir(g.tree, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(g.tree, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if elsewhere(rel) {
				return fs.SkipDir
			}
			return nil
		}
		switch path.Ext(rel) {
		case ".h", ".c", ".inc", ".S":
			all[path.Base(rel)] = append(all[path.Base(rel)], rel)
		}
		return nil
	})
	return all, err
}

// elsewhere are folders that no x86 kernel includes from.
func elsewhere(dir string) bool {
	if a, ok := strings.CutPrefix(dir, "arch/"); ok {
		return a != "x86" && !strings.HasPrefix(a, "x86/")
	}
	switch dir {
	case "tools", "Documentation", "samples", "scripts":
		return true
	}
	return false
}

// resolve finds the files that an #include can mean: that in the file's own
// folder, those in the folders searched by all, else (a makefile may add
// folders) every file whose path ends so.
func (g *Graph) resolve(from, name string, quoted bool, byBase map[string][]string) []string {
	candidates := byBase[path.Base(name)]
	if quoted {
		if own := path.Join(path.Dir(from), name); slices.Contains(candidates, own) {
			return []string{own}
		}
	}
	var out []string
	for _, d := range searched {
		if f := path.Join(d, name); slices.Contains(candidates, f) {
			out = append(out, f)
		}
	}
	if len(out) > 0 {
		return out
	}
	suffix := "/" + strings.TrimLeft(path.Clean("/"+name), "/")
	for _, c := range candidates {
		if strings.HasSuffix("/"+c, suffix) {
			out = append(out, c)
		}
	}
	return out
}

func (g *Graph) text(f string) ([]byte, error) {
	b, err := durable.ReadFile(filepath.Join(g.tree, f), maxSource)
	if err != nil {
		if os.IsNotExist(err) { // made by the build from another file, such as a lexer
			return nil, nil
		}
		return nil, fmt.Errorf("read includes: %w", err)
	}
	return bytes.ReplaceAll(b, []byte("\\\n"), nil), nil
}

// Includers lists the units that include a file, directly or not, sorted; a
// unit includes itself.
func (g *Graph) Includers(file string) []string {
	seen := map[string]bool{file: true}
	todo := []string{file}
	var out []string
	for len(todo) > 0 {
		f := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if g.units[f] {
			out = append(out, f)
		}
		for _, by := range g.included[f] {
			if !seen[by] {
				seen[by] = true
				todo = append(todo, by)
			}
		}
	}
	slices.Sort(out)
	return out
}
