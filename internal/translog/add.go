// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"bytes"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/fault"
)

// Submission is what a log sends to a witness: the size that the witness has
// cosigned before, the proof that the log continues it, and the new checkpoint
// (C2SP tlog-witness, "add-checkpoint").
type Submission struct {
	Old        int64
	Proof      []tlog.Hash
	Checkpoint []byte // signed note
}

// MaxSubmission limits one, in bytes.
const MaxSubmission = MaxCheckpoint + 8<<10

// Encode writes a submission's one form.
func (s Submission) Encode() []byte {
	var b bytes.Buffer
	b.WriteString("old " + strconv.FormatInt(s.Old, 10) + "\n")
	for _, h := range s.Proof {
		b.WriteString(h.String() + "\n")
	}
	b.WriteByte('\n')
	b.Write(s.Checkpoint)
	return b.Bytes()
}

// ParseSubmission reads a submission. Nothing in it is verified.
func ParseSubmission(b []byte) (Submission, error) {
	var s Submission
	bad := func(format string, args ...any) (Submission, error) {
		return Submission{}, fault.New(fault.Invalid, CodeMalformed, "submission: "+format, args...)
	}
	if len(b) > MaxSubmission {
		return bad("%d bytes, limit %d", len(b), MaxSubmission)
	}
	head, checkpoint, ok := strings.Cut(string(b), "\n\n")
	if !ok {
		return bad("no checkpoint")
	}
	lines := strings.Split(head, "\n")
	old, ok := strings.CutPrefix(lines[0], "old ")
	if ok {
		s.Old, ok = parseSize(old)
	}
	if !ok || len(lines)-1 > maxPath {
		return bad("first line %.60q and %d hashes", lines[0], len(lines)-1)
	}
	for _, l := range lines[1:] {
		h, ok := parseHash(l)
		if !ok {
			return bad("line %.60q is no hash", l)
		}
		s.Proof = append(s.Proof, h)
	}
	s.Checkpoint = []byte(checkpoint)
	return s, nil
}
