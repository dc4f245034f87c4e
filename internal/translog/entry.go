// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/fault"
)

// Entry is one line of the log's story: this file was released under this
// name. Its text, whole, is what the tree hashes:
//
//	klatch-log-entry/1
//	target debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb
//	bytes 123456
//	sha256 0123…
//
// each line with a newline at its end. The leaf is SHA-256 over a zero byte
// and that text (RFC 6962, section 2.1). A bundle's digest covers its manifest,
// the manifest's signatures and the module; its name binds kernel and sequence.
type Entry struct {
	Target string `json:"target"` // name in the TUF repository
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // lower-case hexadecimal
}

const entryFormat = "klatch-log-entry/1"

// maxEntry limits one entry, in bytes.
const maxEntry = 1 << 10

// ProofSuffix ends the name of the file that holds a file's proof.
const ProofSuffix = ".tlog-proof"

// ProofPath names the proof of a target: beside it, with another ending, as
// C2SP tlog-proof asks.
func ProofPath(target string) string {
	return strings.TrimSuffix(target, path.Ext(target)) + ProofSuffix
}

// EntryOf describes a file.
func EntryOf(target string, content []byte) Entry {
	sum := sha256.Sum256(content)
	return Entry{Target: target, Bytes: int64(len(content)), SHA256: hex.EncodeToString(sum[:])}
}

// Encode writes the entry's one form.
func (e Entry) Encode() []byte {
	return []byte(entryFormat + "\ntarget " + e.Target + "\nbytes " + strconv.FormatInt(e.Bytes, 10) + "\nsha256 " + e.SHA256 + "\n")
}

// Hash is the entry's leaf in the tree.
func (e Entry) Hash() tlog.Hash { return tlog.RecordHash(e.Encode()) }

var (
	targetPath = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z.+~_-]*(/[0-9A-Za-z_][0-9A-Za-z.+~_-]*)*$`)
	hex64      = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// ParseEntry reads what Encode wrote, and nothing else.
func ParseEntry(b []byte) (Entry, error) {
	var e Entry
	bad := func(format string, args ...any) (Entry, error) {
		return Entry{}, fault.New(fault.Untrusted, CodeMalformed, "log entry: "+format, args...)
	}
	if len(b) > maxEntry {
		return bad("%d bytes, limit %d", len(b), maxEntry)
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) != 5 || lines[0] != entryFormat || lines[4] != "" {
		return bad("%.60q is not of form %s", b, entryFormat)
	}
	var fields [3]string
	for i, word := range []string{"target ", "bytes ", "sha256 "} {
		var ok bool
		if fields[i], ok = strings.CutPrefix(lines[1+i], word); !ok {
			return bad("line %.60q, want one that begins with %q", lines[1+i], word)
		}
	}
	e.Target, e.SHA256 = fields[0], fields[2]
	var ok bool
	if e.Bytes, ok = parseSize(fields[1]); !ok || !targetPath.MatchString(e.Target) || len(e.Target) > 512 || !hex64.MatchString(e.SHA256) {
		return bad("%.200q is impossible", b)
	}
	return e, nil
}
