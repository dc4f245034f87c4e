// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"klatch/internal/forge/lab/framed"
)

// LineWord begins the word on the kernel's command line that tells the init
// of a small guest which terminal the line is, instead of its own ttyS1:
// klatch.line=/dev/ttyS0.
const LineWord = "klatch.line="

// lineWords are the arguments that init gives to the agent.
func lineWords() []string {
	for w := range strings.FieldsSeq(readTrimmed("/proc/cmdline")) {
		if tty, ok := strings.CutPrefix(w, LineWord); ok {
			return []string{tty}
		}
	}
	return nil
}

// openLine opens the agent's end of the line. Without an argument it is a
// serial port of its own. With one it is a line that others use too, so that
// it carries frames: a terminal, with its speed after a comma if it is not
// 115200 baud, or "-", standard input and output.
func openLine(args []string) (io.ReadWriter, error) {
	switch {
	case len(args) == 0:
		return OpenTerminal(agentTTY, DefaultSpeed)
	case args[0] == "-":
		return framed.NewBeacon(stdio{os.Stdin, os.Stdout}), nil
	}
	name, speed, err := parseTerminal(args[0])
	if err != nil {
		return nil, err
	}
	tty, err := OpenTerminal(name, speed)
	if err != nil {
		return nil, err
	}
	return framed.NewBeacon(tty), nil
}

func parseTerminal(arg string) (name string, speed int, err error) {
	name, text, ok := strings.Cut(arg, ",")
	if speed = DefaultSpeed; ok {
		if _, err := fmt.Sscanf(text, "%d", &speed); err != nil || fmt.Sprint(speed) != text {
			return "", 0, fmt.Errorf("terminal %q: speed %q is no number", name, text)
		}
	}
	if !filepath.IsAbs(name) {
		return "", 0, fmt.Errorf("terminal %q: not an absolute path", name)
	}
	return name, speed, nil
}

type stdio struct {
	io.Reader
	io.Writer
}

func (stdio) Close() error { return os.Stdin.Close() }

// DefaultSpeed of a serial line, in baud.
const DefaultSpeed = 115200

// speeds of asm-generic/termbits.h.
var speeds = map[int]uint32{9600: syscall.B9600, 19200: syscall.B19200, 38400: syscall.B38400, 57600: syscall.B57600,
	115200: syscall.B115200, 230400: syscall.B230400, 460800: syscall.B460800, 921600: syscall.B921600,
	1000000: syscall.B1000000, 1500000: syscall.B1500000, 2000000: syscall.B2000000, 3000000: syscall.B3000000}

// CheckSpeed says whether a serial line can have this speed.
func CheckSpeed(baud int) error {
	if _, ok := speeds[baud]; !ok {
		var all []int
		for s := range speeds {
			all = append(all, s)
		}
		slices.Sort(all)
		return fmt.Errorf("%d baud: want one of %v", baud, all)
	}
	return nil
}

// OpenTerminal opens a serial port as a plain pipe for bytes.
func OpenTerminal(name string, baud int) (*os.File, error) {
	if err := CheckSpeed(baud); err != nil {
		return nil, err
	}
	// O_NONBLOCK: the open must not wait for a carrier, and reads can be
	// interrupted by Close.
	tty, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := rawMode(tty, speeds[baud]); err != nil {
		return nil, errors.Join(fmt.Errorf("set %s to raw mode: %w", name, err), tty.Close())
	}
	return tty, nil
}

// Exclusive keeps others from opening the terminal too (TIOCEXCL).
func Exclusive(tty *os.File) error {
	raw, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = ioctl(int(fd), syscall.TIOCEXCL, nil) })
	return errors.Join(err, inner)
}

// rawMode makes the terminal a plain pipe for bytes, as cfmakeraw(3) does.
func rawMode(tty *os.File, speed uint32) error {
	raw, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		var t syscall.Termios
		if inner = ioctl(int(fd), syscall.TCGETS, unsafe.Pointer(&t)); inner != nil {
			return
		}
		t.Iflag &^= syscall.IGNBRK | syscall.BRKINT | syscall.PARMRK | syscall.ISTRIP |
			syscall.INLCR | syscall.IGNCR | syscall.ICRNL | syscall.IXON | syscall.IXOFF
		t.Oflag &^= syscall.OPOST
		t.Lflag &^= syscall.ECHO | syscall.ECHONL | syscall.ICANON | syscall.ISIG | syscall.IEXTEN
		t.Cflag &^= syscall.CSIZE | syscall.PARENB | 0o10017 // speed bits (CBAUD)
		t.Cflag |= syscall.CS8 | syscall.CLOCAL | syscall.CREAD | speed
		t.Cc[syscall.VMIN], t.Cc[syscall.VTIME] = 1, 0
		inner = ioctl(int(fd), syscall.TCSETS, unsafe.Pointer(&t))
	})
	return errors.Join(err, inner)
}
