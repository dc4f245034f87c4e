// SPDX-License-Identifier: Apache-2.0

package board

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// version is what a kernel says about itself: uname -r and uname -v. The
// second holds the build's number and date, so two builds of one release
// differ.
type version struct{ release, build string }

func (v version) String() string { return v.release + " " + v.build }

// imageVersion reads the version out of a bzImage's header, field
// kernel_version (Documentation/arch/x86/boot.rst): "RELEASE (BUILDER) BUILD".
func imageVersion(path string) (version, error) {
	f, err := os.Open(path)
	if err != nil {
		return version{}, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	// The field is 16 bits wide and counts from 0x200.
	head, err := io.ReadAll(io.LimitReader(f, 0x200+1<<16+maxVersion))
	if err != nil {
		return version{}, err
	}
	v, err := parseImage(head)
	if err != nil {
		return v, fmt.Errorf("kernel %s: %w", path, err)
	}
	return v, nil
}

const maxVersion = 512

func parseImage(head []byte) (version, error) {
	if len(head) < 0x210 || string(head[0x202:0x206]) != "HdrS" {
		return version{}, errors.New("not a bzImage, so nobody can tell whether the board runs it")
	}
	at := int(binary.LittleEndian.Uint16(head[0x20e:]))
	if at == 0 || at+0x200 >= len(head) {
		return version{}, errors.New("its header does not say its version")
	}
	text := head[at+0x200:]
	text, _, ok := bytes.Cut(text[:min(len(text), maxVersion)], []byte{0})
	if !ok {
		return version{}, errors.New("its version does not end")
	}
	release, rest, _ := strings.Cut(string(text), " (")
	_, build, ok := strings.Cut(rest, ") #")
	if !ok || release == "" || strings.ContainsAny(release, " \n") {
		return version{}, fmt.Errorf("its version %q is not of the usual form", text)
	}
	return version{release, "#" + build}, nil
}

// state is what the board says about itself after each start.
type state struct {
	running     version
	commandLine string
	cpus        int
	memoryMiB   int
}

// stateScript prints it, one thing a line. It also makes the kernel talk to
// us as the detector needs it: everything on the console, with the time in
// front, nothing held back, and a restart after a panic. "quiet" on the
// board's own command line would else hide a warning.
const stateScript = `set -e
cd /proc/sys/kernel
cat osrelease version /proc/cmdline
grep -c ^processor /proc/cpuinfo
sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo
echo 8 > printk
echo on > printk_devkmsg
echo Y > /sys/module/printk/parameters/time
[ "$(cat panic)" != 0 ] || echo 1 > panic
`

func parseState(out string) (state, error) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 5 {
		return state{}, fmt.Errorf("the board says %q about itself", out)
	}
	var s state
	var kib int
	if _, err := fmt.Sscan(lines[3], &s.cpus); err != nil {
		return state{}, fmt.Errorf("number of processors %q: %w", lines[3], err)
	}
	if _, err := fmt.Sscan(lines[4], &kib); err != nil {
		return state{}, fmt.Errorf("size of memory %q: %w", lines[4], err)
	}
	s.running, s.commandLine, s.memoryMiB = version{lines[0], lines[1]}, strings.TrimSpace(lines[2]), kib/1024
	return s, nil
}

// endsWith: the words must be the last of the kernel's command line.
func (s state) endsWith(words []string) bool {
	return strings.HasSuffix(" "+s.commandLine, " "+strings.Join(words, " "))
}
