// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"bytes"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/fault"
)

// Proof shows that an entry is in the log: where, the hashes from the leaf to
// the root, and a checkpoint with that root (C2SP tlog-proof).
type Proof struct {
	Index      int64
	Path       []tlog.Hash
	Checkpoint []byte // signed note
}

const proofFormat = "c2sp.org/tlog-proof@v1"

// maxPath is the longest path of a tree that a checkpoint may speak of.
const maxPath = 63

// Encode writes the proof's one form.
func (p Proof) Encode() []byte {
	var b bytes.Buffer
	b.WriteString(proofFormat + "\nindex " + strconv.FormatInt(p.Index, 10) + "\n")
	for _, h := range p.Path {
		b.WriteString(h.String() + "\n")
	}
	b.WriteByte('\n')
	b.Write(p.Checkpoint)
	return b.Bytes()
}

// ParseProof reads a proof. Nothing in it is verified. Extra data, which the
// standard allows and nobody signs, is refused.
func ParseProof(b []byte) (Proof, error) {
	var p Proof
	bad := func(format string, args ...any) (Proof, error) {
		return Proof{}, fault.New(fault.Untrusted, CodeMalformed, "log proof: "+format, args...)
	}
	if len(b) > MaxProof {
		return bad("%d bytes, limit %d", len(b), MaxProof)
	}
	head, checkpoint, ok := strings.Cut(string(b), "\n\n")
	if !ok {
		return bad("no checkpoint")
	}
	lines := strings.Split(head, "\n")
	if len(lines) < 2 || lines[0] != proofFormat {
		return bad("first line %.60q, want %q", lines[0], proofFormat)
	}
	index, ok := strings.CutPrefix(lines[1], "index ")
	if ok {
		p.Index, ok = parseSize(index)
	}
	if !ok {
		return bad("line %.60q is no index", lines[1])
	}
	if len(lines)-2 > maxPath {
		return bad("%d hashes, limit %d", len(lines)-2, maxPath)
	}
	for _, l := range lines[2:] {
		h, ok := parseHash(l)
		if !ok {
			return bad("line %.60q is no hash", l)
		}
		p.Path = append(p.Path, h)
	}
	p.Checkpoint = []byte(checkpoint)
	return p, nil
}

// Verify says whether an entry was logged, by the proof that came with its
// file; it needs no network. The result is the checkpoint that shows it.
func (p *Policy) Verify(proof []byte, e Entry) (Checkpoint, error) {
	parsed, err := ParseProof(proof)
	if err != nil {
		return Checkpoint{}, err
	}
	c, err := p.Open(parsed.Checkpoint)
	if err != nil {
		return c, err
	}
	if parsed.Index >= c.Size {
		return Checkpoint{}, fault.New(fault.Untrusted, CodeNotIncluded, "log proof is for entry %d of %d", parsed.Index, c.Size)
	}
	if err := tlog.CheckRecord(parsed.Path, c.Size, c.Root, parsed.Index, e.Hash()); err != nil {
		return Checkpoint{}, fault.New(fault.Untrusted, CodeNotIncluded, "log proof does not show that %.200q with SHA-256 %.64s was logged", e.Target, e.SHA256).
			WithHint("tell the publisher: a file was offered that its log does not know")
	}
	return c, nil
}
