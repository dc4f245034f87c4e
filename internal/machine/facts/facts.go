// SPDX-License-Identifier: Apache-2.0

// Package facts reads what a machine can say about itself without any
// privilege: which kernel runs, which are installed, how locked down it is,
// which livepatches are in it and whether it has complained. It never writes
// and never guesses: what could not be found out is an error or the word
// "unknown", never "none".
//
// Start with Machine.Facts, then Trouble in trouble.go.
package facts

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/wire"
)

// maxFile limits every small file of /proc, /sys and /etc, in bytes; real
// ones are under 4 KiB.
const maxFile = 64 << 10

// Unknown is the word for what could not be found out.
const Unknown = "unknown"

// Machine is a machine below a root folder: "/" for the one this program runs
// on, a captured tree in tests.
type Machine struct {
	Root string
}

// Facts reads what the machine tells its server. An error means that not even
// the running kernel could be identified; Facts then holds the rest.
func (m Machine) Facts(version string) (wire.Facts, error) {
	f := wire.Facts{
		Hostname: m.word("proc/sys/kernel/hostname"),
		BootID:   m.word("proc/sys/kernel/random/boot_id"),
		Lockdown: m.lockdown(),
		Enforced: m.enforced(),
		Version:  version,
	}
	build, err := m.Build()
	f.Kernel = build
	if err != nil {
		return f, err
	}
	if f.BootID == "" {
		return f, fault.New(fault.Internal, "boot_id_unknown", "read %s: nothing there", m.path("proc/sys/kernel/random/boot_id"))
	}
	// An unreadable /boot is told by the reboot advice, not here.
	if ks, err := m.Kernels(); err == nil {
		f.Newer = ks.Newer(build.Release)
	}
	return f, nil
}

// Build identifies the running kernel. The build id comes from the kernel
// itself, not from a file in /boot.
func (m Machine) Build() (kernel.Build, error) {
	var b kernel.Build
	unknown := func(err error) (kernel.Build, error) {
		// Half an identity is none, and could not be sent either.
		return kernel.Build{}, fault.New(fault.Internal, "build_unknown", "identify the running kernel: %w", err).
			WithHint("check that /proc and /sys are mounted and readable: cat /proc/sys/kernel/osrelease; ls -l /sys/kernel/notes")
	}
	if err := b.Arch.UnmarshalText([]byte(runtime.GOARCH)); err != nil {
		return unknown(err)
	}
	rel, err := m.read("proc/sys/kernel/osrelease")
	if err != nil {
		return unknown(err)
	}
	if b.Release, err = kernel.ParseRelease(strings.TrimSpace(string(rel))); err != nil {
		return unknown(err)
	}
	notes, err := m.read("sys/kernel/notes")
	if err != nil {
		return unknown(err)
	}
	if b.ID, err = kernel.ParseNotes(notes); err != nil {
		return unknown(err)
	}
	// The distribution is for paths and people; a machine without one is odd,
	// not broken, and gets no livepatch because no target path fits.
	b.Distro, err = m.distro()
	if err != nil {
		return unknown(err)
	}
	return b, nil
}

// distro is ID and VERSION_ID of os-release(5), such as debian-12.
func (m Machine) distro() (kernel.Distro, error) {
	var d kernel.Distro
	b, err := m.read("etc/os-release")
	if errors.Is(err, fs.ErrNotExist) {
		b, err = m.read("usr/lib/os-release")
	}
	if err != nil {
		return "", err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			values[k] = strings.Trim(v, `"'`)
		}
	}
	name := values["ID"]
	if v := values["VERSION_ID"]; v != "" {
		name += "-" + v
	}
	err = d.UnmarshalText([]byte(name))
	return d, err
}

// lockdown reads the chosen word of "none [integrity] confidentiality"
// (kernel_lockdown(7)). Without the file it is "none" only where the kernel
// lists its security modules and lockdown is not among them.
func (m Machine) lockdown() string {
	if b, err := m.read("sys/kernel/security/lockdown"); err == nil {
		_, rest, ok := strings.Cut(string(b), "[")
		word, _, closed := strings.Cut(rest, "]")
		if ok && closed && slices.Contains([]string{"none", "integrity", "confidentiality"}, word) {
			return word
		}
		return Unknown
	}
	if b, err := m.read("sys/kernel/security/lsm"); err == nil && !slices.Contains(strings.Split(strings.TrimSpace(string(b)), ","), "lockdown") {
		return "none"
	}
	return Unknown
}

// enforced says whether the kernel takes only modules that it can verify.
func (m Machine) enforced() string {
	switch m.word("sys/module/module/parameters/sig_enforce") {
	case "Y":
		return "yes"
	case "N":
		return "no"
	}
	return Unknown
}

// BootID tells one boot from another.
func (m Machine) BootID() (string, error) {
	b, err := m.read("proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// word is a one-line file's content; empty where it cannot be read.
func (m Machine) word(rel string) string {
	b, err := m.read(rel)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (m Machine) path(rel string) string { return filepath.Join(m.Root, rel) }

func (m Machine) read(rel string) ([]byte, error) {
	f, err := os.Open(m.path(rel))
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a regular file", f.Name())
	}
	return durable.ReadLimited(f, f.Name(), maxFile)
}
