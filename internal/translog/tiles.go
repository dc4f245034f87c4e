// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/fault"
)

// Folder is where the files of a log lie in a repository, beside metadata/ and
// targets/: below log/, by the key's id. A log with a new key is a new log, and
// the old one's files stay.
func Folder(log *Verifier) string { return fmt.Sprintf("log/%08x", log.id) }

// CheckpointFile is the newest checkpoint, signed by the log. CosignedFile is
// the newest one that a quorum of witnesses has cosigned.
const (
	CheckpointFile = "checkpoint"
	CosignedFile   = "cosigned"
)

const (
	tileHeight  = 8 // C2SP tlog-tiles
	tileWidth   = 1 << tileHeight
	maxTile     = tileWidth * tlog.HashSize
	maxEntries  = 1 << 20 // that ReadLog holds in memory
	maxBundle   = tileWidth * (2 + maxEntry)
	entriesTile = -1
)

// Read gets one static file of the log by its name below its Folder. An error of
// kind NotFound means that it is not there.
type Read func(ctx context.Context, name string, limit int64) ([]byte, error)

// tileName is a tile's path by C2SP tlog-tiles, which has no height in it.
func tileName(t tlog.Tile) string {
	name := "tile/" + strings.TrimPrefix(t.Path(), fmt.Sprintf("tile/%d/", t.H))
	if t.L == entriesTile {
		name = "tile/entries/" + strings.TrimPrefix(name, "tile/data/")
	}
	return name
}

// readTile gets a tile, or the full one where the partial one is gone.
func readTile(ctx context.Context, read Read, t tlog.Tile, limit int64) ([]byte, error) {
	b, err := read(ctx, tileName(t), limit)
	if fault.KindOf(err) == fault.NotFound && t.W < tileWidth {
		t.W = tileWidth
		return read(ctx, tileName(t), limit)
	}
	return b, err
}

// tileReader is what the tree's mathematics reads hashes with. They are
// verified against the root there.
type tileReader struct {
	ctx  context.Context
	read Read
	err  error // of a file, as opposed to what is in it
}

func (r *tileReader) Height() int { return tileHeight }

func (r *tileReader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var out [][]byte
	for _, t := range tiles {
		b, err := readTile(r.ctx, r.read, t, maxTile)
		if err != nil {
			r.err = err
			return nil, err
		}
		if len(b) < t.W*tlog.HashSize {
			return nil, fmt.Errorf("tile %s has %d bytes", tileName(t), len(b))
		}
		out = append(out, b[:t.W*tlog.HashSize])
	}
	return out, nil
}

func (r *tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

// Extends says whether the log as it is at head still holds, unchanged and at
// its beginning, what it was at old. Both were signed by the log. CodeRollback
// means that head is the older one; CodeInconsistent, that the log has two
// histories, whatever a server did; CodeTiles, that the server's files do not
// belong to head.
func Extends(ctx context.Context, read Read, head, old Checkpoint) error {
	switch {
	case head.Origin != old.Origin:
		return fault.New(fault.Untrusted, CodeOrigin, "log %q is not log %q", head.Origin, old.Origin)
	case head.Size < old.Size:
		return fault.New(fault.Untrusted, CodeRollback, "log %s shows %d entries; %d were seen", head.Origin, head.Size, old.Size).
			WithHint("the server shows an older state than before; tell whoever runs it")
	case head.Size == old.Size && head.Root == old.Root, old.Size == 0:
		return nil
	case head.Size == old.Size:
		return inconsistent(head, old)
	}
	r := &tileReader{ctx: ctx, read: read}
	proof, err := tlog.ProveTree(head.Size, old.Size, tlog.TileHashReader(tlog.Tree{N: head.Size, Hash: head.Root}, r))
	switch {
	case r.err != nil:
		return r.err
	case err != nil:
		return fault.New(fault.Untrusted, CodeTiles, "files of log %s are not those of its checkpoint %d: %w", head.Origin, head.Size, err).
			WithHint("the server's copy is damaged or was changed; nothing of it is used")
	}
	if err := tlog.CheckTree(proof, head.Size, head.Root, old.Size, old.Root); err != nil {
		return inconsistent(head, old)
	}
	return nil
}

func inconsistent(head, old Checkpoint) error {
	return fault.New(fault.Untrusted, CodeInconsistent, "log %s has two histories: checkpoint %d (root %s) does not continue checkpoint %d (root %s)",
		head.Origin, head.Size, head.Root, old.Size, old.Root).
		WithHint("this is evidence of an attack or of a restored backup at the publisher: keep both checkpoints and tell the publisher by another way")
}

// Log is a whole log in memory, verified against a checkpoint.
type Log struct {
	Checkpoint Checkpoint
	Entries    []Entry
	hashes     []tlog.Hash // in the order of tlog.StoredHashIndex
	raw        [][]byte
}

// ReadLog reads all entries and computes the tree from them. The result is
// what the checkpoint speaks of, or there is an error.
func ReadLog(ctx context.Context, read Read, c Checkpoint) (*Log, error) {
	l := &Log{Checkpoint: c}
	if c.Size > maxEntries {
		return nil, fault.New(fault.Invalid, CodeMalformed, "log %s has %d entries, limit %d", c.Origin, c.Size, maxEntries)
	}
	for first := int64(0); first < c.Size; first += tileWidth {
		t := tlog.Tile{H: tileHeight, L: entriesTile, N: first / tileWidth, W: int(min(c.Size-first, tileWidth))}
		b, err := readTile(ctx, read, t, maxBundle)
		if err != nil {
			return nil, err
		}
		for range t.W {
			text, rest, err := cutEntry(b)
			if err != nil {
				return nil, err
			}
			if err := l.append(text); err != nil {
				return nil, err
			}
			b = rest
		}
	}
	root, err := l.root()
	if err != nil {
		return nil, err
	}
	if root != c.Root {
		return nil, fault.New(fault.Untrusted, CodeTiles, "entries of log %s have root %s, its checkpoint %d says %s", c.Origin, root, c.Size, c.Root).
			WithHint("the copy is damaged or was changed; read it from another place")
	}
	return l, nil
}

// Build computes the tree of entries. sign makes a checkpoint of its text.
func Build(origin string, entries []Entry, sign func(body string) ([]byte, error)) (*Log, error) {
	l := &Log{Checkpoint: Checkpoint{Origin: origin, Size: int64(len(entries))}}
	for _, e := range entries {
		if err := l.append(e.Encode()); err != nil {
			return nil, err
		}
	}
	var err error
	if l.Checkpoint.Root, err = l.root(); err != nil {
		return nil, err
	}
	l.Checkpoint.Signed, err = sign(l.Checkpoint.Body())
	return l, err
}

// cutEntry takes one entry off a bundle of entries: two bytes of length, then
// the text (C2SP tlog-tiles, "Log entries").
func cutEntry(b []byte) (text, rest []byte, err error) {
	if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
		return nil, nil, fault.New(fault.Untrusted, CodeMalformed, "bundle of log entries is cut short")
	}
	n := 2 + int(binary.BigEndian.Uint16(b))
	return b[2:n], b[n:], nil
}

func (l *Log) append(text []byte) error {
	e, err := ParseEntry(text)
	if err != nil {
		return err
	}
	more, err := tlog.StoredHashesForRecordHash(int64(len(l.Entries)), tlog.RecordHash(text), l.reader())
	if err != nil {
		return fmt.Errorf("hash log entry %d: %w", len(l.Entries), err)
	}
	l.hashes = append(l.hashes, more...)
	l.Entries = append(l.Entries, e)
	l.raw = append(l.raw, text)
	return nil
}

func (l *Log) reader() tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var out []tlog.Hash
		for _, i := range indexes {
			if i < 0 || i >= int64(len(l.hashes)) {
				return nil, fmt.Errorf("hash %d of %d", i, len(l.hashes))
			}
			out = append(out, l.hashes[i])
		}
		return out, nil
	})
}

func (l *Log) root() (tlog.Hash, error) {
	root, err := tlog.TreeHash(int64(len(l.Entries)), l.reader())
	if err != nil {
		return root, fmt.Errorf("hash log: %w", err)
	}
	return root, nil
}

// Index finds an entry.
func (l *Log) Index(e Entry) (int64, bool) {
	i := slices.Index(l.Entries, e)
	return int64(i), i >= 0
}

// Prove makes the proof of an entry under a checkpoint of the log's own size,
// such as the same one with cosignatures.
func (l *Log) Prove(index int64, signed []byte) (Proof, error) {
	path, err := tlog.ProveRecord(l.Checkpoint.Size, index, l.reader())
	if err != nil {
		return Proof{}, fmt.Errorf("prove log entry %d: %w", index, err)
	}
	return Proof{Index: index, Path: path, Checkpoint: signed}, nil
}

// ProveExtends lists the hashes that show that the log continues its first
// size entries, for a witness (RFC 6962, section 2.1.2).
func (l *Log) ProveExtends(size int64) ([]tlog.Hash, error) {
	if size == 0 || size == l.Checkpoint.Size {
		return nil, nil
	}
	proof, err := tlog.ProveTree(l.Checkpoint.Size, size, l.reader())
	if err != nil {
		return nil, fmt.Errorf("prove that the log continues entry %d: %w", size, err)
	}
	return proof, nil
}

// RootAt is the root that the log had with its first size entries.
func (l *Log) RootAt(size int64) (tlog.Hash, error) {
	if size < 0 || size > l.Checkpoint.Size {
		return tlog.Hash{}, fault.New(fault.Invalid, CodeRollback, "log %s has %d entries, not %d", l.Checkpoint.Origin, l.Checkpoint.Size, size)
	}
	root, err := tlog.TreeHash(size, l.reader())
	if err != nil {
		return root, fmt.Errorf("hash log: %w", err)
	}
	return root, nil
}

// File is one static file of a log.
type File struct {
	Name    string // below its Folder
	Content []byte
}

// Files are all files of the log at this size, computed from its entries: what
// a copy must hold. The checkpoint is the last one.
func (l *Log) Files() ([]File, error) {
	var out []File
	size := l.Checkpoint.Size
	for first := int64(0); first < size; first += tileWidth {
		w := min(size-first, tileWidth)
		var b []byte
		for _, text := range l.raw[first : first+w] {
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(text))), text...) //nolint:gosec // at most maxEntry
		}
		out = append(out, File{tileName(tlog.Tile{H: tileHeight, L: entriesTile, N: first / tileWidth, W: int(w)}), b})
	}
	for _, t := range tlog.NewTiles(tileHeight, 0, size) {
		b, err := tlog.ReadTileData(t, l.reader())
		if err != nil {
			return nil, fmt.Errorf("make tile %s: %w", tileName(t), err)
		}
		out = append(out, File{tileName(t), b})
	}
	return append(out, File{CheckpointFile, l.Checkpoint.Signed}), nil
}

// CheckFiles compares the files that somebody serves with those that follow
// from the entries.
func (l *Log) CheckFiles(ctx context.Context, read Read) error {
	files, err := l.Files()
	if err != nil {
		return err
	}
	var bad []error
	for _, f := range files {
		b, err := read(ctx, f.Name, maxBundle)
		if err == nil && string(b) != string(f.Content) {
			err = fault.New(fault.Untrusted, CodeTiles, "file %s of log %s is not what follows from its entries", f.Name, l.Checkpoint.Origin)
		}
		if err != nil {
			bad = append(bad, err)
		}
	}
	return errors.Join(bad...)
}

// ExtendsWhole is Extends for a log that was read whole.
func ExtendsWhole(l *Log, old Checkpoint) error {
	if old.Size > l.Checkpoint.Size {
		return Extends(context.Background(), nil, l.Checkpoint, old)
	}
	root, err := l.RootAt(old.Size)
	if err != nil {
		return err
	}
	if root != old.Root {
		return inconsistent(l.Checkpoint, old)
	}
	return nil
}
