// SPDX-License-Identifier: Apache-2.0

// Package archive is the one file that carries a repository over an air gap: a
// line, a list of what is in it, then the files back to back. There is no path
// that leads anywhere, no link and no compression in it, and every size is
// known before the first byte of a file is read.
//
//	klatch-export/1 <bytes of the list in decimal>\n
//	<list: Manifest as JSON>
//	<the files, in the order of the list, nothing between or after them>
//
// The digests in the list find damage. They prove nothing about who made the
// file: what is in it is signed, and package repo verifies that as if it came
// from any other source. Start with Write and Open.
package archive

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"klatch/internal/fault"
)

// Format is the version word of the file.
const Format = "klatch-export/1"

// Limits of a file. The largest repository that one top list can name is far
// below.
const (
	MaxManifest = 64 << 20
	MaxFiles    = 200_000
	MaxFile     = 80 << 20
)

// Manifest is the list. All but Files is for people: nothing is decided by it.
type Manifest struct {
	Publisher string    `json:"publisher"`
	Created   time.Time `json:"created"`
	Filter    string    `json:"filter"`
	Metadata  int64     `json:"metadata_version"`
	Expires   time.Time `json:"metadata_expires"`
	Recalls   int64     `json:"recalls_version"`
	Files     []File    `json:"files"`
}

// File is one file of the repository under its name there.
type File struct {
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // lower-case hexadecimal
}

// Write makes an archive. read gives each file of the list in turn; one that
// is not what the list says ends it.
func Write(ctx context.Context, w io.Writer, m Manifest, read func(ctx context.Context, name string) ([]byte, error)) error {
	list, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(list) > MaxManifest || len(m.Files) > MaxFiles {
		return fault.New(fault.Invalid, "export_too_large", "%d files in a list of %d bytes, at most %d and %d", len(m.Files), len(list), MaxFiles, MaxManifest).
			WithHint("export less: a filter for each half")
	}
	buffered := bufio.NewWriter(w)
	if _, err := fmt.Fprintf(buffered, "%s %d\n%s", Format, len(list), list); err != nil {
		return err
	}
	for _, f := range m.Files {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := read(ctx, f.Name)
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(b); int64(len(b)) != f.Bytes || hex.EncodeToString(sum[:]) != f.SHA256 {
			return fault.New(fault.Internal, "export_changed", "file %s changed while it was exported", f.Name).WithHint("repeat the export")
		}
		if _, err := buffered.Write(b); err != nil {
			return err
		}
	}
	return buffered.Flush()
}

// Archive is an open one.
type Archive struct {
	Manifest
	file  io.ReaderAt
	close io.Closer
	at    map[string]place
}

type place struct {
	offset, bytes int64
	sha256        string
}

var (
	headPattern   = regexp.MustCompile(`^klatch-export/1 ([1-9][0-9]{0,8})\n$`)
	digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

func malformed(format string, args ...any) error {
	return fault.New(fault.Invalid, "export_malformed", "not a whole export of format "+Format+": "+format, args...).
		WithHint("copy the file again, and compare its digest with that at the place where it was made")
}

// Open reads the list and checks that the file is exactly as long as it says.
// allowed says which names may be in it.
func Open(path string, allowed func(name string) bool) (*Archive, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a named pipe does not hold us up
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = malformed("%s is not a regular file", path)
	}
	var a *Archive
	if err == nil {
		a, err = Parse(f, st.Size(), allowed)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	a.close = f
	return a, nil
}

// Parse is Open for bytes that lie elsewhere.
func Parse(f io.ReaderAt, whole int64, allowed func(string) bool) (*Archive, error) {
	head := make([]byte, len(Format)+11)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	line, _, _ := strings.Cut(string(head[:n]), "\n")
	m := headPattern.FindStringSubmatch(line + "\n")
	if m == nil {
		return nil, malformed("it does not begin with %q and a number", Format)
	}
	size, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil || size > MaxManifest || size > whole {
		return nil, malformed("a list of %s bytes in a file of %d; limit %d", m[1], whole, MaxManifest)
	}
	list := make([]byte, size)
	begin := int64(len(line) + 1)
	if _, err := f.ReadAt(list, begin); err != nil {
		return nil, malformed("the list is cut off: %s", err)
	}
	a := &Archive{file: f, at: map[string]place{}}
	if err := json.Unmarshal(list, &a.Manifest); err != nil {
		return nil, malformed("the list is not JSON of its form: %s", err)
	}
	return a, a.index(begin+size, whole, allowed)
}

// index checks every line of the list.
func (a *Archive) index(offset, end int64, allowed func(string) bool) error {
	if len(a.Files) > MaxFiles {
		return malformed("%d files, limit %d", len(a.Files), MaxFiles)
	}
	for _, f := range a.Files {
		_, twice := a.at[f.Name]
		switch {
		case !allowed(f.Name):
			return malformed("%.160q cannot be a file of a repository", f.Name)
		case twice:
			return malformed("%s is in it twice", f.Name)
		case f.Bytes < 0 || f.Bytes > MaxFile:
			return malformed("%s has %d bytes, limit %d", f.Name, f.Bytes, MaxFile)
		case !digestPattern.MatchString(f.SHA256):
			return malformed("%s has no SHA-256", f.Name)
		case f.Bytes > end-offset:
			return malformed("it ends at byte %d, inside %s", end, f.Name)
		}
		a.at[f.Name] = place{offset, f.Bytes, f.SHA256}
		offset += f.Bytes
	}
	if offset != end {
		return malformed("%d bytes after its end", end-offset)
	}
	return nil
}

// Close ends reading.
func (a *Archive) Close() error { return a.close.Close() }

// Has says whether a file is in it.
func (a *Archive) Has(name string) bool { _, ok := a.at[name]; return ok }

// Read gives a file; ok is false if it is not in it.
func (a *Archive) Read(name string) (r *io.SectionReader, ok bool) {
	p, ok := a.at[name]
	return io.NewSectionReader(a.file, p.offset, p.bytes), ok
}

// Check compares each file with its digest and names all that are damaged. It
// reads the whole archive once; tell hears of the bytes so far.
func (a *Archive) Check(ctx context.Context, tell func(done, total int64)) error {
	var total, done int64
	for _, f := range a.Files {
		total += f.Bytes
	}
	var damaged []string
	const step = 256 << 20
	next := int64(step)
	for _, f := range a.Files {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, _ := a.Read(f.Name)
		h := sha256.New()
		if _, err := io.Copy(h, r); err != nil {
			return fmt.Errorf("read %s: %w", f.Name, err)
		}
		if hex.EncodeToString(h.Sum(nil)) != f.SHA256 {
			damaged = append(damaged, f.Name)
		}
		if done += f.Bytes; done >= next && tell != nil {
			tell(done, total)
			next = done + step
		}
	}
	if len(damaged) == 0 {
		return nil
	}
	const most = 10
	names := strings.Join(damaged[:min(most, len(damaged))], ", ")
	if n := len(damaged) - most; n > 0 {
		names += fmt.Sprintf(" and %d more", n)
	}
	return fault.New(fault.Untrusted, "export_damaged", "%d of %d files were damaged on the way: %s", len(damaged), len(a.Files), names).
		WithHint("nothing was changed; copy the file again")
}
