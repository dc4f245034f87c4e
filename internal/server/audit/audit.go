// SPDX-License-Identifier: Apache-2.0

// Package audit keeps the record of what people changed on a server: who,
// when, what, before and after. It is a file of lines that only grows, one
// JSON object each; every line holds the digest of the one before, so that a
// line that is changed or taken out shows, all but at the end. It must not
// decide anything.
//
// A line is on disk before the change that it tells of: a change without a
// line there is not, a line whose change failed is followed by one that says
// so.
package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Entry is one line.
type Entry struct {
	At     time.Time       `json:"at"`
	Who    string          `json:"who"`
	What   string          `json:"what"` // "promote", "tiers", "hold", "release", "keys", "init"
	Tier   string          `json:"tier,omitempty"`
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
	Reason string          `json:"reason,omitempty"`
	Signed []string        `json:"signed,omitempty"` // by which keys, as "role key-id"
	Failed string          `json:"failed,omitempty"` // the change of the line before did not happen
	Prev   string          `json:"prev"`             // SHA-256 of the line before, hexadecimal; empty in the first
}

// maxLine limits one line, in bytes; maxFile is how much is read.
const (
	maxLine = 1 << 20
	maxFile = 256 << 20
)

// Log is the file.
type Log struct {
	path string
	mu   sync.Mutex
}

// Open names the file; it need not be there.
func Open(path string) *Log { return &Log{path: path} }

// Append writes a line and returns when it is on disk.
func (l *Log) Append(e Entry) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	unlock, err := durable.Lock(l.path + ".lock")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	last, torn, err := lastLine(f)
	if err != nil {
		return err
	}
	if e.Prev = ""; last != nil {
		sum := sha256.Sum256(last)
		e.Prev = hex.EncodeToString(sum[:])
	}
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if len(b) > maxLine {
		return fault.New(fault.Invalid, "audit_too_long", "audit line of %d bytes, limit %d", len(b), maxLine)
	}
	if torn { // a crash in the middle of a write; what it tells of never happened
		b = append([]byte("\n"), b...)
	}
	if _, err := f.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return durable.SyncDir(filepath.Dir(l.path))
}

// lastLine reads the last line, without its end.
func lastLine(f *os.File) (line []byte, torn bool, err error) {
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return nil, false, err
	}
	from := max(st.Size()-2*maxLine, 0)
	b := make([]byte, st.Size()-from)
	if _, err := f.ReadAt(b, from); err != nil && !errors.Is(err, io.EOF) {
		return nil, false, err
	}
	torn = b[len(b)-1] != '\n'
	b = bytes.TrimSuffix(b, []byte("\n"))
	return b[bytes.LastIndexByte(b, '\n')+1:], torn, nil
}

// Last reads the newest entries, newest first. Broken says of how many lines
// of the whole file the digest of the line before is wrong, or that cannot be
// read: somebody changed the file, or a crash tore one.
func (l *Log) Last(n int) (entries []Entry, broken int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f, err := os.Open(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	defer f.Close() //nolint:errcheck // read only
	lines := bufio.NewScanner(io.LimitReader(f, maxFile))
	lines.Buffer(nil, maxLine+1)
	prev := ""
	for lines.Scan() {
		var e Entry
		bad := json.Unmarshal(lines.Bytes(), &e) != nil
		if bad || e.Prev != prev {
			broken++
		}
		sum := sha256.Sum256(lines.Bytes())
		prev = hex.EncodeToString(sum[:])
		if bad {
			continue
		}
		if entries = append(entries, e); len(entries) > n {
			entries = entries[1:]
		}
	}
	slices.Reverse(entries)
	return entries, broken, lines.Err()
}
