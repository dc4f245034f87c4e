// SPDX-License-Identifier: Apache-2.0

// Package queue holds the source patches of one series in their order, as the
// kernel's stable-queue does: a folder with a file named series and one .patch
// per fix. A patch file begins with header lines of ours and a line of three
// dashes, then the diff. Checks lie beside it.
package queue

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Limits of foreign bytes. Upstream stable fixes are a few KiB.
const (
	maxPatch = 4 << 20
	maxCheck = 32 << 20 // a static program
	maxFiles = 200      // files one source patch may touch
)

// Patch is one source patch of a queue.
type Patch struct {
	Name   string // file name without ".patch"
	Fixes  []cve.ID
	Origin string   // where the change comes from, for people
	Author string   // who put it here, whom a reviewer must not be; may be empty
	Diff   []byte   // as List gives it, nothing but heads and hunks
	Files  []string // touched, relative to the source tree
}

// ReadDiff reads a diff that somebody gives us; what is too large for any fix
// is not read.
func ReadDiff(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxPatch {
		return nil, tooLarge(st.Size())
	}
	return durable.ReadFile(path, maxPatch)
}

func tooLarge(n int64) error {
	return fault.New(fault.Invalid, "patch_too_large", "source patch has %d bytes, limit %d", n, maxPatch).
		WithHint("a fix of upstream has a few KiB: split the change into one source patch for each fix")
}

// Queue is the queue of one series in a publisher's data folder.
type Queue struct {
	dir    string
	Series string
}

// Open names a queue; it need not exist.
func Open(dataDir, series string) Queue {
	return Queue{filepath.Join(dataDir, "queue", series), series}
}

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$`)

// Add puts a patch at the end of the queue. A patch of that name must not be
// there yet. The file is written before the series names it, so a crash
// leaves at most a file that nobody uses.
func (q Queue) Add(p Patch) error {
	if !namePattern.MatchString(p.Name) || p.Name == "series" {
		return fault.New(fault.Invalid, "bad_patch_name", "%.120q cannot name a source patch", p.Name).
			WithHint("use letters, digits, dots and dashes, such as CVE-2026-12345")
	}
	if len(p.Fixes) == 0 {
		return fault.New(fault.Invalid, "no_fixes", "source patch %s fixes nothing", p.Name).WithHint("name its CVEs: --fixes CVE-2026-12345")
	}
	var err error
	if p.Files, err = Lint(p.Diff); err != nil {
		return fmt.Errorf("source patch %s: %w", p.Name, err)
	}
	if h, err := q.Handwritten(); err != nil {
		return err
	} else if h != nil {
		return fault.New(fault.Conflict, "mixed_queue", "queue %s holds a hand-written livepatch", q.Series).
			WithHint("keep two queues, or write the source patch as part of the module")
	}
	if n := len(p.encode()); n > maxPatch { // List would refuse the whole queue
		return tooLarge(int64(n))
	}
	names, err := q.names()
	if err != nil {
		return err
	}
	if slices.Contains(names, p.Name) {
		return fault.New(fault.Conflict, "patch_exists", "source patch %s is in queue %s already", p.Name, q.Series).
			WithHint("drop it first: klatch-forge queue drop --series %s %s", q.Series, p.Name)
	}
	if err := os.MkdirAll(filepath.Join(q.dir, "checks"), 0o755); err != nil {
		return err
	}
	if err := durable.WriteFile(q.file(p.Name), p.encode(), 0o644); err != nil {
		return err
	}
	return q.writeSeries(append(names, p.Name))
}

// Drop takes a patch out of the series; its file stays for the record.
func (q Queue) Drop(name string) error {
	names, err := q.names()
	if err != nil {
		return err
	}
	i := slices.Index(names, name)
	if i < 0 {
		return fault.New(fault.NotFound, "no_patch", "source patch %s is not in queue %s", name, q.Series)
	}
	return q.writeSeries(slices.Delete(names, i, i+1))
}

// List reads the queue in its order. A queue that does not exist is empty.
func (q Queue) List() ([]Patch, error) {
	names, err := q.names()
	if err != nil {
		return nil, err
	}
	var ps []Patch
	for _, n := range names {
		b, err := durable.ReadFile(q.file(n), maxPatch)
		if err != nil {
			return nil, err
		}
		p, err := decode(n, b)
		if err != nil {
			return nil, err
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// SetCheck stores the program that shows the flaw of a fix: exit status 1
// where the flaw shows, 0 where it does not, anything else where it could not
// find out.
func (q Queue) SetCheck(id cve.ID, program []byte) error {
	if len(program) == 0 || len(program) > maxCheck {
		return fault.New(fault.Invalid, "bad_check", "check of %s has %d bytes, limit %d", id, len(program), maxCheck)
	}
	if err := os.MkdirAll(filepath.Join(q.dir, "checks"), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(q.CheckFile(id), program, 0o755)
}

// CheckFile is where the check of a fix lies, if there is one.
func (q Queue) CheckFile(id cve.ID) string { return filepath.Join(q.dir, "checks", string(id)) }

// Check reads the check of a fix; nil means that there is none.
func (q Queue) Check(id cve.ID) ([]byte, error) {
	b, err := durable.ReadFile(q.CheckFile(id), maxCheck)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

func (q Queue) file(name string) string { return filepath.Join(q.dir, name+".patch") }

func (q Queue) names() ([]string, error) {
	b, err := durable.ReadFile(filepath.Join(q.dir, "series"), 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name := strings.TrimSuffix(line, ".patch")
		if !namePattern.MatchString(name) {
			return nil, fault.New(fault.Invalid, "bad_series", "series file of %s: %.120q is not a patch name", q.Series, line)
		}
		names = append(names, name)
	}
	return names, nil
}

func (q Queue) writeSeries(names []string) error {
	var b bytes.Buffer
	for _, n := range names {
		fmt.Fprintf(&b, "%s.patch\n", n)
	}
	return durable.WriteFile(filepath.Join(q.dir, "series"), b.Bytes(), 0o644)
}

func (p Patch) encode() []byte {
	var b bytes.Buffer
	for _, id := range p.Fixes {
		fmt.Fprintf(&b, "Fixes-CVE: %s\n", id)
	}
	if p.Origin != "" {
		fmt.Fprintf(&b, "Origin: %s\n", strings.ReplaceAll(p.Origin, "\n", " "))
	}
	if p.Author != "" {
		fmt.Fprintf(&b, "Author: %s\n", strings.Join(strings.Fields(p.Author), " "))
	}
	b.WriteString("---\n")
	b.Write(p.Diff)
	return b.Bytes()
}

func decode(name string, b []byte) (Patch, error) {
	p := Patch{Name: name}
	head, diff, ok := bytes.Cut(b, []byte("\n---\n"))
	if !ok {
		return p, fault.New(fault.Invalid, "bad_patch", "source patch %s has no line of three dashes after its header", name)
	}
	for line := range strings.Lines(string(head)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "Fixes-CVE":
			id, err := cve.Parse(value)
			if err != nil {
				return p, fmt.Errorf("source patch %s: %w", name, err)
			}
			p.Fixes = append(p.Fixes, id)
		case "Origin":
			p.Origin = value
		case "Author":
			p.Author = value
		}
	}
	var err error
	if p.Files, p.Diff, err = read(diff); err != nil {
		return p, fmt.Errorf("source patch %s: %w", name, err)
	}
	if len(p.Fixes) == 0 {
		return p, fault.New(fault.Invalid, "no_fixes", "source patch %s names no CVE in its header", name)
	}
	return p, nil
}
