// SPDX-License-Identifier: Apache-2.0

//go:build vm

package board_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/board"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/testkit"
)

// emulated is a board made of QEMU. All that is known of it outside is a Unix
// socket, the other end of its only serial port, and a program that switches
// its power. Its firmware takes one-shot words for the kernel's command line
// from the first sector of its disk, as boot loaders do from theirs.
type emulated struct {
	dir, power, socket string
	file               board.File
}

const powerScript = `#!/bin/sh
# power on|off: the power switch of the emulated board
set -e
cd "$(dirname "$0")"
case $1 in
on)
	[ ! -e on ] || exit 0
	touch on
	setsid sh -c 'while [ -e on ]; do
		words=$(dd if=disk bs=512 count=1 2>/dev/null | tr -d "\000")
		dd if=/dev/zero of=disk bs=512 count=1 conv=notrunc 2>/dev/null
		timeout --foreground -s KILL 900 qemu-system-x86_64 -nodefaults -no-user-config -display none -machine q35 \
			-accel tcg,thread=multi -cpu max -m 512M -smp 2 -action reboot=shutdown \
			-chardev socket,id=line,path=line.sock,server=on,wait=on -device isa-serial,chardev=line \
			-drive if=none,id=disk,file=disk,format=raw -device nvme,serial=disk,drive=disk \
			-kernel kernel -initrd initrd -append "$(cat words) $words" $(cat options)
	done' >qemu.log 2>&1 </dev/null &
	echo $! >pid
	;;
off)
	[ -e on ] || exit 0
	rm -f on
	kill -s KILL -- "-$(cat pid)"
	rm -f line.sock
	;;
esac
`

// newBoard makes the board; it is off.
func newBoard(t *testing.T) *emulated {
	t.Helper()
	testkit.Need(t, "qemu", "kernel")
	e := &emulated{dir: t.TempDir()}
	e.power, e.socket = filepath.Join(e.dir, "power"), filepath.Join(e.dir, "line.sock")
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t)})
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := rig.SmallGuest(e.dir)
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{initrd: "initrd", testkit.Kernel(): "kernel"} {
		if err := os.Symlink(from, filepath.Join(e.dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	e.write(t, "power", powerScript)
	e.write(t, "words", "console=ttyS0,115200 tsc=reliable no_timer_check klatch.line=/dev/ttyS0")
	e.write(t, "options", "")
	e.write(t, "disk", string(make([]byte, 1<<20)))
	t.Cleanup(func() { e.switchPower(t, "off") })
	e.file = e.load(t, "")
	return e
}

func (e *emulated) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(e.dir, name), []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// load reads the board's file as a person would write it, with more at its end.
func (e *emulated) load(t *testing.T, more string) board.File {
	t.Helper()
	e.write(t, "board.toml", fmt.Sprintf(`name = "emulated-1"
boot_seconds = 90
[power]
on = [%[1]q, "on"]
off = [%[1]q, "off"]
off_seconds = 0
[line]
socket = %[2]q
`, e.power, e.socket)+more)
	f, err := board.Load(filepath.Join(e.dir, "board.toml"))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (e *emulated) switchPower(t *testing.T, how string) {
	if out, err := exec.Command(e.power, how).CombinedOutput(); err != nil {
		t.Errorf("power %s: %v: %s", how, err, out)
	}
}

func (e *emulated) rig(t *testing.T, change func(*board.File)) *board.Rig {
	t.Helper()
	f := e.file
	if change != nil {
		change(&f)
	}
	r, err := board.New(board.Config{File: f, Scratch: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func spec() lab.Spec { return lab.Spec{Name: "trial", Kernel: testkit.Kernel()} }

// TestBoardWithASerialLine runs the suite of all rigs. The kernel's messages
// and the agent share the one line; the words of the kernel's command line are
// chosen through the one-shot setting on the board's disk.
func TestBoardWithASerialLine(t *testing.T) {
	e := newBoard(t)
	e.file = e.load(t, `[kernel]
choose = ["sh", "-c", "echo -n '{append}' | dd of=/dev/nvme0n1 bs=512 conv=sync && sync"]
`)
	rig := e.rig(t, nil)
	if got := lab.Describe(rig); got != (lab.About{Kind: lab.Hardware, Name: "emulated-1"}) {
		t.Errorf("about %+v", got)
	}
	labtest.Run(t, rig, spec())
}

func boot(t *testing.T, rig lab.Rig, s lab.Spec) lab.Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	m, err := rig.Boot(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func output(t *testing.T, m lab.Machine, script string) string {
	t.Helper()
	res, err := m.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c", script}})
	if err != nil || res.Exit != 0 {
		t.Fatalf("%s: exit status %d, %v: %s", script, res.Exit, err, res.Stderr)
	}
	return string(res.Stdout)
}

// patched gives a copy of the kernel whose header names another release.
func patched(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile(testkit.Kernel())
	if err != nil {
		t.Fatal(err)
	}
	release := strings.Fields(string(raw[0x200+int(raw[0x20e])+int(raw[0x20f])<<8:])[:64])[0]
	other := strings.Replace(release, release[:3], "9.9", 1)
	path := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(path, bytes.ReplaceAll(raw, []byte(release), []byte(other)), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
