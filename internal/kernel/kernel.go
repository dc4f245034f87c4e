// SPDX-License-Identifier: Apache-2.0

// Package kernel names kernels: the compiled one (BuildID), what it calls
// itself (Release), and the pair with its origin (Build). Parsers for what
// the kernel itself says about its identity are here too; reading files is
// the caller's work.
package kernel

import (
	"encoding/hex"
	"fmt"
	"regexp"

	"klatch/internal/fault"
)

// BuildID identifies one compiled kernel: the GNU build id of its vmlinux,
// which the kernel's Makefile makes a SHA-1 (LDFLAGS_vmlinux, --build-id=sha1).
// Two kernels may share a release string and still differ; a livepatch fits
// one build.
type BuildID [20]byte

// ParseBuildID reads 40 lower-case hexadecimal digits.
func ParseBuildID(s string) (BuildID, error) {
	var id BuildID
	if len(s) != 2*len(id) {
		return id, fault.New(fault.Invalid, "bad_build_id", "build id %.50q has %d characters, want %d", s, len(s), 2*len(id))
	}
	b, err := hex.DecodeString(s)
	if err != nil || hex.EncodeToString(b) != s {
		return id, fault.New(fault.Invalid, "bad_build_id", "build id %q is not lower-case hexadecimal", s)
	}
	copy(id[:], b)
	if id.IsZero() {
		return id, fault.New(fault.Invalid, "bad_build_id", "build id is all zeros")
	}
	return id, nil
}

// String is the form that ParseBuildID reads.
func (id BuildID) String() string { return hex.EncodeToString(id[:]) }

// Short is the first 12 digits, for people.
func (id BuildID) Short() string { return id.String()[:12] }

// IsZero tells an unset build id from a real one.
func (id BuildID) IsZero() bool { return id == BuildID{} }

// MarshalText writes the form that ParseBuildID reads.
func (id BuildID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText parses.
func (id *BuildID) UnmarshalText(b []byte) error {
	p, err := ParseBuildID(string(b))
	if err != nil {
		return err
	}
	*id = p
	return nil
}

// Release is the string of uname -r, such as "6.1.0-50-cloud-amd64".
type Release string

// The kernel limits a release to 64 characters (__NEW_UTS_LEN). The letters
// are those that are safe in file names and in TUF target paths.
var releasePattern = regexp.MustCompile(`^[0-9][0-9A-Za-z.+~_-]{0,63}$`)

// ParseRelease checks the form.
func ParseRelease(s string) (Release, error) {
	if !releasePattern.MatchString(s) {
		return "", fault.New(fault.Invalid, "bad_release", "%.80q is not a kernel release", s).
			WithHint("write it as uname -r prints it, such as 6.1.0-50-cloud-amd64")
	}
	return Release(s), nil
}

// UnmarshalText parses.
func (r *Release) UnmarshalText(b []byte) error {
	p, err := ParseRelease(string(b))
	if err != nil {
		return err
	}
	*r = p
	return nil
}

// Arch is Debian's name of an architecture.
type Arch string

// AMD64 is the only architecture so far.
const AMD64 Arch = "amd64"

// UnmarshalText parses.
func (a *Arch) UnmarshalText(b []byte) error {
	if Arch(b) != AMD64 {
		return fault.New(fault.Invalid, "bad_arch", "architecture %.20q is not supported", b)
	}
	*a = AMD64
	return nil
}

// Distro is a distribution release such as "debian-12".
type Distro string

var distroPattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,31}(-[a-z0-9.]{1,16})?$`)

// UnmarshalText parses.
func (d *Distro) UnmarshalText(b []byte) error {
	if !distroPattern.Match(b) {
		return fault.New(fault.Invalid, "bad_distro", "%.60q is not a distribution such as debian-12", b)
	}
	*d = Distro(b)
	return nil
}

// Build is one compiled kernel and where it comes from. ID alone decides
// whether a livepatch fits; the other fields say it to people and to paths.
// Distro is empty where the kernel alone was asked.
type Build struct {
	Distro  Distro  `json:"distro,omitempty"`
	Arch    Arch    `json:"arch"`
	Release Release `json:"release"`
	ID      BuildID `json:"build_id"`
}

func (b Build) String() string { return fmt.Sprintf("%s (build %s)", b.Release, b.ID.Short()) }

// Fits says why a livepatch for want does not fit the kernel that runs. Both
// the release and the build id must be equal: with MODVERSIONS the kernel
// itself compares neither (measured: a module for the neighbor build loads).
func Fits(want, running Build) error {
	switch {
	case running.ID.IsZero():
		return fault.New(fault.Internal, "build_unknown", "the running kernel's build id is unknown")
	case want.ID != running.ID:
		return fault.New(fault.Untrusted, "wrong_build", "livepatch is for %s, the running kernel is %s", want, running).
			WithHint("wait for a livepatch of this kernel build, or boot the kernel it is for")
	case want.Release != running.Release:
		return fault.New(fault.Untrusted, "wrong_release", "livepatch is for release %s, the running kernel says %s", want.Release, running.Release)
	case want.Arch != running.Arch:
		return fault.New(fault.Untrusted, "wrong_arch", "livepatch is for %s, the machine is %s", want.Arch, running.Arch)
	}
	return nil
}
