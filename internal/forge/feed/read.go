// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Read adds a feed to the set. What it is, the name says:
//
//	a folder                  CVE records of the kernel CNA
//	*.jsonl, *.jsonl.gz       records of the kernel CNA, one a line
//	*.csv, *.toml             priorities of a vendor; a .csv is named for it
//	*.json                    CISA's known exploited vulnerabilities, or one CVE record
//
// Each but the folder may end in .gz. date is the day that the feed speaks of;
// empty means the day the file was last written. A list that brings its own
// date keeps it.
func (s *Set) Read(name, date string) error {
	from, err := sourceOf(name, date)
	if err != nil {
		return err
	}
	if folder, err := isFolder(name); err != nil {
		return noFeed(name, err)
	} else if folder {
		return s.readFolder(name, from)
	}
	f, err := os.Open(name)
	if err != nil {
		return noFeed(name, err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	return s.read(f, filepath.Base(name), from)
}

func noFeed(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "no_feed", "there is no feed %s: %w", name, err).WithHint("name an existing file or folder")
	}
	return err
}

func sourceOf(name, date string) (cve.Source, error) {
	from := cve.Source{File: filepath.Base(name)}
	st, err := os.Stat(name)
	if err != nil {
		return from, noFeed(name, err)
	}
	from.Date = st.ModTime().UTC().Format(time.DateOnly)
	if date != "" {
		if from.Date, err = day(date); err != nil {
			return from, fault.New(fault.Invalid, "bad_date", "feed %s: %w", name, err)
		}
	}
	return from, nil
}

// read takes a feed whose name says what it is.
func (s *Set) read(r io.Reader, name string, from cve.Source) error {
	plain, err := uncompressed(r, name)
	if err != nil {
		return err
	}
	stem := strings.TrimSuffix(name, ".gz")
	switch ext := filepath.Ext(stem); ext {
	case ".jsonl":
		return s.readLines(plain, from)
	case ".csv":
		vendor, _, _ := strings.Cut(strings.ToLower(stem), ".")
		return s.readCSV(plain, vendor, from)
	case ".toml", ".json":
		b, err := durable.ReadLimited(plain, name, maxBytes)
		if err != nil {
			return fault.New(fault.Invalid, "bad_feed", "%w", err)
		}
		if ext == ".toml" {
			return s.readTOML(b, from)
		}
		return s.readJSON(b, from)
	}
	return fault.New(fault.Invalid, "bad_feed", "feed %s: its name does not say what it is", name).
		WithHint("name it *.jsonl, *.jsonl.gz, VENDOR.csv, *.toml or *.json")
}

// readJSON tells CISA's list from a single CVE record.
func (s *Set) readJSON(b []byte, from cve.Source) error {
	var kind struct {
		List     json.RawMessage `json:"vulnerabilities"`
		Metadata json.RawMessage `json:"cveMetadata"`
	}
	err := json.Unmarshal(b, &kind)
	switch {
	case err != nil:
		return fault.New(fault.Invalid, "bad_feed", "read feed %s: %w", from.File, err)
	case kind.List != nil:
		return s.readKEV(b, from)
	case kind.Metadata != nil:
		from.Feed = CNA
		l, err := parseCVE5(b)
		if err != nil {
			s.problem(Problem{File: from.File, Place: "record", Text: err.Error()})
			return nil //nolint:nilerr // kept aside
		}
		return s.take(l, "record", from)
	}
	return fault.New(fault.Invalid, "bad_feed", "feed %s is neither CISA's list of known exploited vulnerabilities nor a CVE record", from.File)
}

// limited fails where a limit is reached, so that a cut is never taken for the
// end.
type limited struct {
	r io.Reader
	n int64
}

func (l *limited) Read(b []byte) (int, error) {
	n, err := l.r.Read(b)
	if l.n -= int64(n); l.n < 0 {
		return 0, fmt.Errorf("it is over the limit of %d bytes", maxBytes)
	}
	return n, err
}

func uncompressed(r io.Reader, name string) (io.Reader, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(2)
	if err != nil || !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return &limited{br, maxBytes}, nil //nolint:nilerr // a read error comes again
	}
	z, err := gzip.NewReader(br)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_feed", "uncompress feed %s: %w", name, err)
	}
	return &limited{z, maxBytes}, nil
}
