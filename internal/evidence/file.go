// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"strings"
	"time"

	"klatch/internal/fault"
)

// FileFormat is the version word of an evidence file.
const FileFormat = "klatch-evidence/1"

// MaxFile limits an evidence file, in bytes: what servers copy of a target
// that is no livepatch.
const MaxFile = 4 << 20

// File is what is published beside a bundle: all statements about one
// livepatch. Its own members are the publisher's word; as a target of the TUF
// repository they are signed by the targets keys.
type File struct {
	Format string `json:"format"`
	About  About  `json:"about"`
	// Signed is when the livepatch passed the signing gate.
	Signed     time.Time  `json:"signed"`
	Statements []Envelope `json:"statements"`
}

// Encode writes the one form of an evidence file.
func (f File) Encode() ([]byte, error) {
	f.Format, f.Signed = FileFormat, At(f.Signed)
	b, err := encode(f)
	if err == nil && len(b) > MaxFile {
		err = fault.New(fault.Invalid, "evidence_too_large", "the evidence has %d bytes, limit %d", len(b), MaxFile)
	}
	return b, err
}

// ParseFile reads what Encode wrote, and nothing else.
func ParseFile(b []byte) (File, error) {
	var f File
	if len(b) > MaxFile {
		return f, refuse("evidence_malformed", "evidence file has %d bytes, limit %d", len(b), MaxFile)
	}
	if err := decode(b, &f); err != nil {
		return f, refuse("evidence_malformed", "evidence file: %w", err)
	}
	if f.Format != FileFormat {
		return f, refuse("evidence_malformed", "evidence file has format %.40q, want %q", f.Format, FileFormat)
	}
	return f, nil
}

const bundleSuffix = ".lpb"

// TargetPath is where the evidence of a bundle lies in the TUF repository; ok
// says whether the path is that of a bundle.
func TargetPath(bundle string) (path string, ok bool) {
	name, ok := strings.CutSuffix(bundle, bundleSuffix)
	return name + ".evidence.json", ok
}

// Refuse is a refusal with a code of the catalog, for those who read
// repositories.
func Refuse(code fault.Code, format string, args ...any) error { return refuse(code, format, args...) }
