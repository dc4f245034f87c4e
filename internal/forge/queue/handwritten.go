// SPDX-License-Identifier: Apache-2.0

package queue

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Limits of a hand-written livepatch. The kernel's samples have 100 lines.
const (
	maxSourceFiles = 64
	maxSourceFile  = 1 << 20 // bytes
	maxDeclared    = 1000    // functions, callbacks or shadow variables
)

// DeclaredName is the file that says what a hand-written livepatch does.
const DeclaredName = "livepatch.toml"

// Handwritten is a livepatch whose module somebody wrote in C, with the
// kernel's livepatch API, where source patches do not suffice. It lies in the
// queue's folder "source".
type Handwritten struct {
	Fixes     []cve.ID   `toml:"fixes"`
	Author    string     `toml:"author"` // whom a reviewer must not be; may be empty
	Functions []Replaced `toml:"function"`
	Callbacks []Callback `toml:"callback"`
	Shadows   []Shadow   `toml:"shadow"`

	Files []SourceFile `toml:"-"` // all, by name; livepatch.toml is one of them
}

// Replaced is one function that the module replaces.
type Replaced struct {
	Object   string `toml:"object"` // vmlinux or a module
	Name     string `toml:"name"`
	Position uint   `toml:"position"` // old_sympos: 0 where the object has one symbol of this name
	File     string `toml:"file"`     // of the kernel's source, which the function is in
}

// Callback says which callbacks the module has for an object.
type Callback struct {
	Object string   `toml:"object"`
	When   []string `toml:"when"` // pre_patch, post_patch, pre_unpatch, post_unpatch
}

// CallbackTimes are the callbacks of struct klp_callbacks.
var CallbackTimes = []string{"pre_patch", "post_patch", "pre_unpatch", "post_unpatch"}

// Shadow is a shadow variable that the module attaches to the kernel's data.
type Shadow struct {
	ID    uint64 `toml:"id"`
	About string `toml:"about"` // for the reviewer: what, and to which type
}

// SourceFile is one file of a hand-written livepatch.
type SourceFile struct {
	Name    string
	Content []byte
}

func (q Queue) sourceDir() string { return filepath.Join(q.dir, "source") }

// Handwritten reads the hand-written livepatch of the queue; nil means that it
// has none.
func (q Queue) Handwritten() (*Handwritten, error) {
	if _, err := os.Lstat(q.sourceDir()); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return ReadHandwritten(q.sourceDir())
}

// SetHandwritten copies a hand-written livepatch into the queue, in place of
// what was there. A queue holds either source patches or a hand-written one.
func (q Queue) SetHandwritten(h *Handwritten) error {
	if names, err := q.names(); err != nil {
		return err
	} else if len(names) > 0 {
		return fault.New(fault.Conflict, "mixed_queue", "queue %s holds %d source patches", q.Series, len(names)).
			WithHint("keep two queues, or write the source patches as part of the module and drop them here")
	}
	if err := os.MkdirAll(filepath.Join(q.dir, "checks"), 0o755); err != nil {
		return err
	}
	// The new folder is complete before the old one goes; a crash between the
	// two renames leaves a queue without one, which is empty and builds nothing.
	tmp, err := os.MkdirTemp(q.dir, ".source-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // gone after the rename
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	for _, f := range h.Files {
		if err := durable.WriteFile(filepath.Join(tmp, f.Name), f.Content, 0o644); err != nil {
			return err
		}
	}
	old := tmp + ".old"
	switch err := os.Rename(q.sourceDir(), old); {
	case err == nil:
		defer os.RemoveAll(old) //nolint:errcheck // nobody reads it
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := os.Rename(tmp, q.sourceDir()); err != nil {
		return err
	}
	return durable.SyncDir(q.dir)
}

// DropHandwritten takes the hand-written livepatch out of the queue.
func (q Queue) DropHandwritten() error {
	err := os.RemoveAll(q.sourceDir())
	return errors.Join(err, durable.SyncDir(q.dir))
}

var (
	sourceName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,60}\.[ch]$`)
	identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,126}$`)
	include    = regexp.MustCompile(`^\s*#\s*include\b\s*(.*)$`)
	included   = regexp.MustCompile(`^(?:<([A-Za-z0-9_][A-Za-z0-9_./-]*)>|"([a-z][a-z0-9_]*\.h)")\s*(?:$|/[*/])`)
)

// ReadHandwritten reads a folder as foreign files: plain ones only, of few
// kinds, that include nothing from outside of the kernel's source.
func ReadHandwritten(dir string) (*Handwritten, error) {
	bad := func(format string, args ...any) (*Handwritten, error) {
		return nil, fault.New(fault.Invalid, "bad_source", "hand-written livepatch in %s: "+format, append([]any{dir}, args...)...)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return bad("%w", err)
	}
	if len(entries) > maxSourceFiles {
		return bad("%d files, limit %d", len(entries), maxSourceFiles)
	}
	var files []SourceFile
	for _, e := range entries { // sorted by name
		if !e.Type().IsRegular() {
			return bad("%.100q is no plain file", e.Name())
		}
		b, err := durable.ReadFile(filepath.Join(dir, e.Name()), maxSourceFile)
		if err != nil {
			return bad("%w", err)
		}
		files = append(files, SourceFile{e.Name(), b})
	}
	return ParseHandwritten(files)
}

// ParseHandwritten checks the files of a hand-written livepatch.
func ParseHandwritten(files []SourceFile) (*Handwritten, error) {
	bad := func(format string, args ...any) (*Handwritten, error) {
		return nil, fault.New(fault.Invalid, "bad_source", "hand-written livepatch: "+format, args...)
	}
	var h Handwritten
	code, declared := 0, false
	for _, f := range files {
		switch {
		case len(f.Content) > maxSourceFile:
			return bad("%s has %d bytes, limit %d", f.Name, len(f.Content), maxSourceFile)
		case f.Name == DeclaredName:
			declared = true
			if err := toml.NewDecoder(bytes.NewReader(f.Content)).DisallowUnknownFields().Decode(&h); err != nil {
				return bad("%s: %w", f.Name, err)
			}
		case !sourceName.MatchString(f.Name) || strings.HasPrefix(f.Name, "klatch_"):
			return bad("%.100q cannot be the name of a source file; use letters, digits and _, as in fix.c", f.Name)
		default:
			if path.Ext(f.Name) == ".c" {
				code++
			}
			if err := lintSource(f); err != nil {
				return bad("%w", err)
			}
		}
	}
	if !declared || code == 0 {
		return bad("needs %s and a .c file", DeclaredName)
	}
	h.Files = files
	if err := h.check(); err != nil {
		return bad("%s: %w", DeclaredName, err)
	}
	return &h, nil
}

// lintSource refuses what reads other files than the kernel's source. The
// sandbox of the build is the border; this is for the reviewer, who must see
// all that is compiled.
func lintSource(f SourceFile) error {
	if !utf8.Valid(f.Content) || bytes.IndexByte(f.Content, 0) >= 0 {
		return fault.New(fault.Invalid, "bad_source", "%s is no text", f.Name)
	}
	text := string(f.Content)
	if strings.Contains(text, "incbin") || strings.Contains(text, "??/") || strings.Contains(text, "%:") {
		return fault.New(fault.Invalid, "bad_source", "%s has an incbin, a trigraph or a digraph", f.Name)
	}
	for line := range strings.Lines(strings.ReplaceAll(text, "\\\n", "")) {
		m := include.FindStringSubmatch(strings.TrimRight(line, "\r\n"))
		if m == nil {
			continue
		}
		ok := included.FindStringSubmatch(m[1])
		if ok == nil || slices.Contains(strings.Split(ok[1], "/"), "..") {
			return fault.New(fault.Invalid, "bad_source", "%s includes %.100q, which is not a header of the kernel or of its own folder", f.Name, m[1])
		}
	}
	return nil
}

// check refuses a declaration that says nothing, or something twice.
func (h *Handwritten) check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "bad_source", format, args...)
	}
	if len(h.Functions) == 0 || len(h.Functions) > maxDeclared || len(h.Callbacks) > maxDeclared || len(h.Shadows) > maxDeclared {
		return bad("names %d functions, %d callbacks and %d shadow variables; want at least one function, at most %d of each",
			len(h.Functions), len(h.Callbacks), len(h.Shadows), maxDeclared)
	}
	if len(h.Fixes) == 0 {
		return fault.New(fault.Invalid, "no_fixes", "names no CVE").WithHint(`fixes = ["CVE-2026-12345"]`)
	}
	for i, id := range h.Fixes {
		if _, err := cve.Parse(string(id)); err != nil {
			return err
		}
		if slices.Contains(h.Fixes[:i], id) {
			return bad("names %s twice", id)
		}
	}
	seen := map[string]bool{}
	for _, f := range h.Functions {
		file, ok := inside("a/" + f.File)
		switch key := f.Object + ":" + f.Name; {
		case !identifier.MatchString(f.Object) || !identifier.MatchString(f.Name):
			return bad("function %.100q of object %.100q is no name; a clone of the compiler's, such as x.isra.0, cannot be replaced by hand", f.Name, f.Object)
		case !ok || file != f.File || path.Ext(file) != ".c":
			return bad("function %s: file %.100q is no C file of the kernel's source", f.Name, f.File)
		case seen[key]:
			return bad("names function %s twice", key)
		default:
			seen[key] = true
		}
	}
	for _, c := range h.Callbacks {
		if seen["callback "+c.Object] || !slices.ContainsFunc(h.Functions, func(f Replaced) bool { return f.Object == c.Object }) {
			return bad("callbacks of %.100q twice, or without a function of it", c.Object)
		}
		seen["callback "+c.Object] = true
		for i, w := range c.When {
			if !slices.Contains(CallbackTimes, w) || slices.Contains(c.When[:i], w) {
				return bad("callback %.100q; want each once of %s", w, strings.Join(CallbackTimes, ", "))
			}
		}
		if len(c.When) == 0 {
			return bad("callbacks of %s without when", c.Object)
		}
	}
	for i, s := range h.Shadows {
		if s.About == "" || slices.ContainsFunc(h.Shadows[:i], func(o Shadow) bool { return o.ID == s.ID }) {
			return bad("shadow variable %#x twice, or without about", s.ID)
		}
	}
	return nil
}
