// SPDX-License-Identifier: Apache-2.0

// Package livepatch describes a livepatch: the built, cumulative kernel module
// of one kernel build, its manifest, and the bundle that carries both. It is
// plain data; signatures are checked in package trust.
package livepatch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// Sequence orders the livepatches of one kernel build. It starts at 1 and
// only grows: we never go back to an older livepatch, because the kernel runs
// only the new livepatch's callbacks when one replaces another
// (Documentation/livepatch/cumulative-patches.rst, "Limitations").
type Sequence uint32

// CheckReplace says why a livepatch may not follow another. have is 0 where
// none was ever confirmed or is loaded. Gaps are allowed: livepatches are
// cumulative.
func CheckReplace(have, next Sequence) error {
	switch {
	case next == 0:
		return fault.New(fault.Invalid, "bad_sequence", "sequence 0 is not a livepatch")
	case next == have:
		return fault.New(fault.Conflict, "sequence_same", "sequence %d is already the newest here", next)
	case next < have:
		return fault.New(fault.Conflict, "sequence_lower", "sequence %d does not follow %d", next, have).
			WithHint("livepatches only go forward; a bad one is superseded by a higher sequence")
	}
	return nil
}

// modulePrefix starts the name of every livepatch module of ours, so that a
// foreign livepatch is never taken for one.
const modulePrefix = "klatch_"

// ModuleName is the module's name, and so its folder in
// /sys/kernel/livepatch. It holds no dash, which the kernel would turn into
// an underscore.
func (s Sequence) ModuleName() string { return modulePrefix + strconv.FormatUint(uint64(s), 10) }

// SequenceOf reads a module name of ours back.
func SequenceOf(moduleName string) (Sequence, bool) {
	digits, ok := strings.CutPrefix(moduleName, modulePrefix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || n == 0 || Sequence(n).ModuleName() != moduleName {
		return 0, false
	}
	return Sequence(n), true
}

// Check says what proves a fix: whether a program showed the flaw before and
// not after. A finished transition proves nothing (a half-imported fix loads
// and changes nothing).
type Check string

// The states of a fix's check.
const (
	Unchecked Check = "unchecked" // nobody showed that it works
	Passed    Check = "passed"    // the flaw showed before and not after, on this kernel build
)

// Fix is one vulnerability that a livepatch makes harmless.
type Fix struct {
	CVE   cve.ID `json:"cve"`
	Check Check  `json:"check"`
}

// Function is one function that a livepatch replaces. Object is "vmlinux" or
// a module's name.
type Function struct {
	Object string `json:"object"`
	Name   string `json:"name"`
}

func (f Function) String() string { return f.Object + ":" + f.Name }

// Module describes the signed module file, whole.
type Module struct {
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
	SHA512 string `json:"sha512"`
}

// ManifestFormat is the version word of the manifest.
const ManifestFormat = "klatch-manifest/1"

// Limits of foreign bytes. The largest livepatch measured (over a thousand
// fixes) stays well below; a bundle is read into memory.
const (
	MaxManifest = 1 << 20
	MaxModule   = 64 << 20
)

// Manifest is the signed description of one livepatch: these bytes, for this
// kernel build, at this place in the order.
type Manifest struct {
	Format    string       `json:"format"`
	Kernel    kernel.Build `json:"kernel"`
	Sequence  Sequence     `json:"sequence"`
	Module    Module       `json:"module"`
	Fixes     []Fix        `json:"fixes"`
	Functions []Function   `json:"functions"`
}

// Encode writes the one form of a manifest: JSON with one-space indent, fields
// in the order of the type, a newline at the end.
func (m Manifest) Encode() ([]byte, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	return append(b, '\n'), nil
}

// ParseManifest reads what Encode wrote, and nothing else: unknown or repeated
// fields, other spellings of the same value and trailing bytes are refused,
// because the encoding of what was read must be the input.
func ParseManifest(b []byte) (Manifest, error) {
	var m Manifest
	if len(b) > MaxManifest {
		return m, fault.New(fault.Invalid, "manifest_malformed", "manifest has %d bytes, limit %d", len(b), MaxManifest)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return m, fault.New(fault.Invalid, "manifest_malformed", "read manifest: %w", err)
	}
	again, err := m.Encode()
	if err != nil {
		return m, err
	}
	if !bytes.Equal(again, b) {
		return m, fault.New(fault.Invalid, "manifest_malformed", "manifest is not in its canonical form")
	}
	return m, nil
}

var (
	hex64          = regexp.MustCompile(`^[0-9a-f]{64}$`)
	hex128         = regexp.MustCompile(`^[0-9a-f]{128}$`)
	functionName   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]{0,510}$`) // KSYM_NAME_LEN is 512 since 6.1
	objectName     = regexp.MustCompile(`^[A-Za-z0-9_]{1,55}$`)            // MODULE_NAME_LEN is 56
	malformedCause = fault.Code("manifest_malformed")
)

func (m Manifest) validate() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, malformedCause, "manifest: "+format, args...)
	}
	switch {
	case m.Format != ManifestFormat:
		return bad("format %.40q, want %q", m.Format, ManifestFormat)
	case m.Kernel.ID.IsZero() || m.Kernel.Release == "" || m.Kernel.Arch == "" || m.Kernel.Distro == "":
		return bad("kernel is incomplete")
	case m.Sequence == 0:
		return bad("sequence is 0")
	case m.Module.Name != m.Sequence.ModuleName():
		return bad("module name %.60q, want %q for sequence %d", m.Module.Name, m.Sequence.ModuleName(), m.Sequence)
	case m.Module.Bytes <= 0 || m.Module.Bytes > MaxModule:
		return bad("module of %d bytes, limit %d", m.Module.Bytes, MaxModule)
	case !hex64.MatchString(m.Module.SHA256) || !hex128.MatchString(m.Module.SHA512):
		return bad("module digests are not SHA-256 and SHA-512 in hexadecimal")
	case len(m.Functions) == 0:
		return bad("no function is replaced")
	}
	seen := map[cve.ID]bool{}
	for _, f := range m.Fixes {
		if f.Check != Passed && f.Check != Unchecked {
			return bad("fix %s has check %.40q", f.CVE, f.Check)
		}
		if f.CVE == "" || seen[f.CVE] {
			return bad("fix %q is empty or listed twice", f.CVE)
		}
		seen[f.CVE] = true
	}
	for _, f := range m.Functions {
		if !objectName.MatchString(f.Object) || !functionName.MatchString(f.Name) {
			return bad("function %.80q of object %.80q is not a name", f.Name, f.Object)
		}
	}
	return nil
}

// CVEs lists what the livepatch fixes.
func (m Manifest) CVEs() []cve.ID {
	ids := make([]cve.ID, 0, len(m.Fixes))
	for _, f := range m.Fixes {
		ids = append(ids, f.CVE)
	}
	return ids
}

// TargetPath is the livepatch's name in the TUF repository. A machine takes
// no target whose path does not follow from its manifest.
func (m Manifest) TargetPath() string {
	return fmt.Sprintf("%s/%s/%s/%s"+BundleSuffix, m.Kernel.Distro, m.Kernel.Arch, m.Kernel.Release, m.Module.Name)
}
