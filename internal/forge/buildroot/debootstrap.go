// SPDX-License-Identifier: Apache-2.0

package buildroot

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/archive"
)

// writeMirror makes a mirror on disk in the form that debootstrap reads: the
// stanzas that apt's signed lists have, and links to the files that apt
// fetched. debootstrap compares each file's size and SHA-256 with its stanza.
func writeMirror(dir, suite string, ps []archive.Package, file func(archive.Package) string) error {
	lists := filepath.Join(dir, "dists", suite, "main", "binary-amd64")
	for _, d := range []string{lists, filepath.Join(dir, "pool")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	var all bytes.Buffer
	for _, p := range ps {
		name := "pool/" + p.SHA256 + ".deb"
		if err := os.Symlink(file(p), filepath.Join(dir, name)); err != nil {
			return err
		}
		for line := range strings.Lines(p.Control) {
			if strings.HasPrefix(line, "Filename:") {
				line = "Filename: " + name + "\n"
			}
			all.WriteString(line)
		}
		all.WriteString("\n")
	}
	release := fmt.Sprintf("Suite: %s\nCodename: %s\nArchitectures: amd64\nComponents: main\nSHA256:\n %x %d main/binary-amd64/Packages\n",
		suite, suite, sha256.Sum256(all.Bytes()), all.Len())
	for f, text := range map[string][]byte{filepath.Join(lists, "Packages"): all.Bytes(),
		filepath.Join(dir, "dists", suite, "Release"): []byte(release)} {
		if err := os.WriteFile(f, text, 0o644); err != nil { //nolint:forbidigo // thrown away with the whole mirror
			return err
		}
	}
	return nil
}

// debootstrap installs everything that the mirror has. The packages' scripts
// run as root, as in every installation of Debian, but in name spaces of their
// own and without network; what it mounts goes with the name spaces, however
// it ends. The mirror on disk is not signed: apt has checked what is in it.
func debootstrap(ctx context.Context, s Spec, mirror, dir string) error {
	cmd := exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--no-check-gpg", "--include="+strings.Join(s.Packages, ","),
		s.Suite, dir, "file://"+mirror)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=/nonexistent"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL,
		Cloneflags:   syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Unshareflags: syscall.CLONE_NEWNS}
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		const enough = 2000
		return fault.New(fault.Internal, "debootstrap", "debootstrap of %s: %w: %s", s.Suite, err, bytes.TrimSpace(out[max(0, len(out)-enough):])).
			WithHint("is debootstrap installed? in the source folder: tools/deps build")
	}
	return nil
}

// installed checks that the folder holds what apt said, all of it and nothing
// else: what dpkg has recorded must be the packages that the digest names.
func installed(r Root) error {
	f, err := os.Open(filepath.Join(r.Dir, "var/lib/dpkg/status"))
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	have := map[string]string{}
	var name string
	ok := false
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		key, value, _ := strings.Cut(sc.Text(), ": ")
		switch key {
		case "Package":
			name, ok = value, false
		case "Status":
			ok = value == "install ok installed"
		case "Version":
			if ok {
				have[name] = value
			}
		}
	}
	if err := sc.Err(); err != nil {
		return err
	}
	if !maps.Equal(have, r.Packages) {
		var diff []string
		for n, v := range r.Packages {
			if have[n] != v {
				diff = append(diff, fmt.Sprintf("%s %q instead of %q", n, have[n], v))
			}
		}
		for n := range have {
			if r.Packages[n] == "" {
				diff = append(diff, n+" was not asked for")
			}
		}
		return fault.New(fault.Internal, "debootstrap", "debootstrap installed something else than apt chose: %s", strings.Join(diff, ", "))
	}
	return nil
}

// trim takes out what no build reads: package files and records, texts, and
// what debootstrap took over from this host.
func trim(dir string) error {
	for _, pattern := range []string{"var/cache/*", "var/lib/*", "var/log/*", "usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*",
		"usr/share/info/*", "etc/resolv.conf", "etc/hostname", "boot/*", "dev/*", "tmp/*"} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, p := range paths {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}
