// SPDX-License-Identifier: Apache-2.0

// Package blob says where a server's copy of a repository lies: named files
// that are written whole, in a folder or in an object store. It must not know
// what a file means, and believes nothing that it reads: who reads verifies.
// Start with Store; package blobtest checks an implementation.
package blob

import (
	"context"
	"io"
	"regexp"
	"strings"

	"klatch/internal/fault"
)

// Store holds files by name. All methods are safe for concurrent use.
//
// Names are those that Valid accepts; any other one is an error of kind
// invalid. What Put wrote is kept when it returns, and a reader sees the old
// content or the new, whole. A file that is not there is an error of kind
// not_found; a store that cannot be reached one of kind unavailable.
type Store interface {
	// Open gives a file's bytes. The caller closes it.
	Open(ctx context.Context, name string) (Reader, error)
	// Put writes a file. Header is for who serves the files without us.
	Put(ctx context.Context, name string, content []byte, h Header) error
	// List gives the names below a prefix that ends in a slash, or all for
	// the empty one, sorted.
	List(ctx context.Context, prefix string) ([]string, error)
	// Delete removes a file. One that is not there is no error.
	Delete(ctx context.Context, name string) error
	// Place says to a person where the files are.
	Place() string
}

// Reader is an open file.
type Reader interface {
	io.ReadSeekCloser
	Size() int64
}

// Header is what a web server or an object store says with a file.
type Header struct {
	ContentType, CacheControl string
}

// maxName limits a name, in bytes: a target's path and what goes before it.
const maxName = 768

var pattern = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z.+~_-]*(/[0-9A-Za-z_][0-9A-Za-z.+~_-]*)*$`)

// Valid refuses names that a file system, a URL or an object store could read
// otherwise than we mean them.
func Valid(name string) error {
	if len(name) > maxName || !pattern.MatchString(name) {
		return fault.New(fault.Invalid, "bad_name", "%.160q cannot name a file of the repository", name)
	}
	return nil
}

// ValidPrefix is Valid for List.
func ValidPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	name, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fault.New(fault.Invalid, "bad_name", "prefix %.160q does not end in a slash", prefix)
	}
	return Valid(name)
}

// Read gives a file of at most limit bytes; a longer one is an error.
func Read(ctx context.Context, s Store, name string, limit int64) ([]byte, error) {
	r, err := s.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // read only
	if r.Size() > limit {
		return nil, tooLong(name, limit)
	}
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fault.New(fault.Unavailable, "storage_unavailable", "read %s: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, tooLong(name, limit)
	}
	return b, nil
}

func tooLong(name string, limit int64) error {
	return fault.New(fault.Untrusted, "file_too_long", "file %s is over the limit of %d bytes", name, limit)
}

// Missing is the error for a file that is not there.
func Missing(name string, cause error) error {
	return fault.New(fault.NotFound, "file_missing", "file %s is not there: %w", name, cause)
}
