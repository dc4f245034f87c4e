// SPDX-License-Identifier: Apache-2.0

// Package translog reads the publisher's transparency log: the public list of
// every file that was ever released, which can only grow. It owns the formats
// (entry, checkpoint, cosignature, policy, proof, tiles) and the questions that
// a machine, a server, a witness and an auditor ask of them. It must not write
// a log and holds no log key; that is package forge/publog.
//
// Start with Policy.Verify: it says whether a file was logged, without a
// network. Extends says whether two checkpoints are of one history.
//
// The formats are those of C2SP, so other people's tools read this log too:
// signed-note, tlog-checkpoint, tlog-tiles, tlog-cosignature, tlog-witness,
// tlog-proof and tlog-policy. The tree is that of RFC 6962, section 2.
package translog

import (
	"encoding/base64"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/fault"
)

// The codes. Only Inconsistent is evidence of an attack by itself: the log key
// has signed two histories.
const (
	CodeNoProof      fault.Code = "log_no_proof"     // nothing says that the file was logged
	CodeMalformed    fault.Code = "log_malformed"    // not in the form of the standards
	CodeUntrusted    fault.Code = "log_untrusted"    // log signature
	CodeOrigin       fault.Code = "log_origin"       // of another log
	CodeQuorum       fault.Code = "log_quorum"       // too few witnesses
	CodeNotIncluded  fault.Code = "log_not_included" // the proof is not about this file
	CodeInconsistent fault.Code = "log_inconsistent" // two histories
	CodeRollback     fault.Code = "log_rollback"     // the log shows less than was seen
	CodeTiles        fault.Code = "log_tiles"        // the server's files are not those of the log
	CodePolicy       fault.Code = "log_policy"       // the policy itself
)

// Limits of foreign bytes. A log of ours has tens of entries a week.
const (
	MaxCheckpoint = 32 << 10
	MaxProof      = 40 << 10
	maxSize       = 1 << 40 // entries that a checkpoint may speak of
)

// Checkpoint is what the log says of itself at one moment: so many entries,
// with this root (C2SP tlog-checkpoint).
type Checkpoint struct {
	Origin string
	Size   int64
	Root   tlog.Hash
	Signed []byte    // the signed note, for those who believe nobody
	Log    *Verifier // whose signature was verified
}

// Body is the signed text.
func (c Checkpoint) Body() string {
	return c.Origin + "\n" + strconv.FormatInt(c.Size, 10) + "\n" + c.Root.String() + "\n"
}

// parseBody reads the signed text. Extension lines are refused: our log writes
// none, and nobody agrees on what they mean.
func parseBody(text string) (Checkpoint, error) {
	var c Checkpoint
	bad := func(format string, args ...any) (Checkpoint, error) {
		return Checkpoint{}, fault.New(fault.Untrusted, CodeMalformed, "checkpoint: "+format, args...)
	}
	lines := strings.Split(text, "\n")
	switch {
	case len(lines) < 4 || lines[len(lines)-1] != "":
		return bad("%d lines, want origin, size and root", len(lines))
	case len(lines) > 4:
		return bad("extension lines, the first is %.60q", lines[3])
	case !validName(lines[0]):
		return bad("origin %.80q is not a name", lines[0])
	}
	c.Origin = lines[0]
	var ok bool
	if c.Size, ok = parseSize(lines[1]); !ok {
		return bad("size %.40q", lines[1])
	}
	if c.Root, ok = parseHash(lines[2]); !ok {
		return bad("root %.60q", lines[2])
	}
	return c, nil
}

// parseSize reads a decimal number in its one form.
func parseSize(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 0 && n <= maxSize && strconv.FormatInt(n, 10) == s
}

// parseHash reads a hash in the one form of its base64.
func parseHash(s string) (h tlog.Hash, ok bool) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(h) || len(s) != base64.StdEncoding.EncodedLen(len(h)) {
		return h, false
	}
	copy(h[:], b)
	return h, true
}
