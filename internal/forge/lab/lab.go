// SPDX-License-Identifier: Apache-2.0

// Package lab tries livepatches on machines that may be broken: it owns what
// a rig must offer (Rig, Machine), how a trial is judged (Verdict, Judge)
// and what counts as trouble in a kernel's log (ScanConsole).
//
// It starts no programs and knows no emulator; drivers such as qemu do. A
// driver that passes the suite in labtest may be used for the gate. Start
// reading with Rig, then with Judge: the most important rule is that a fault
// of the lab is never counted as a fault of the livepatch, and never as a
// pass.
package lab

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"time"
)

// FilesDir is where Spec.Files appear inside every guest, read-only on
// guests that have a root disk.
const FilesDir = "/lab"

// DefaultMaxOutput limits stdout and stderr of one command, each: a guest
// that prints for ever must not fill the publisher's memory.
const DefaultMaxOutput = 1 << 20

// DefaultTimeout ends a command that does not say how long it may take.
const DefaultTimeout = 60 * time.Second

// ErrGuestRebooted says that the guest's kernel started anew while somebody
// waited for an answer. It is not a fault of the lab by itself: the console
// tells who did it, and Judge reads it.
var ErrGuestRebooted = errors.New("guest rebooted by itself")

// Rig makes machines. Boot may be called concurrently; each Machine is
// independent of the others.
type Rig interface {
	// Boot starts a machine and waits until its agent answers. Every error
	// is a BrokenError: nothing under test runs yet. When Boot returns an
	// error nothing is left behind. ctx bounds the start only.
	Boot(ctx context.Context, s Spec) (Machine, error)
}

// About says what kind of machine a result comes from. The stored words are
// never renamed.
type About struct {
	// Kind is Virtual or Hardware.
	Kind string `json:"kind"`
	// Name of the board; virtual machines have none.
	Name string `json:"name,omitempty"`
}

// The kinds of machines.
const (
	Virtual  = "virtual"
	Hardware = "hardware"
)

// Describe says what kind of machines a rig makes: virtual ones, unless its
// driver has a method About that says otherwise.
func Describe(r Rig) About {
	if d, ok := r.(interface{ About() About }); ok {
		return d.About()
	}
	return About{Kind: Virtual}
}

// Spec says what machine is wanted. The zero value of each optional field is
// a good choice of the driver.
type Spec struct {
	// Name appears in errors and in the names of temporary folders.
	Name string
	// Kernel is a bootable kernel image (bzImage) on the publisher's side.
	Kernel string
	// Initrd is an initramfs to start from. Without Initrd and Root the
	// driver makes the small guest: busybox and the agent, nothing else.
	Initrd string
	// Root is a raw disk image with a root file system that starts the
	// agent. The machine works on its own copy-on-write layer, the image
	// stays as it is.
	Root string
	// Firmware starts the machine through UEFI; nil hands it the kernel.
	Firmware *Firmware
	// Files are put into FilesDir of the guest.
	Files []File
	// Append is added at the end of the kernel's command line, where it wins
	// over what the driver says.
	Append []string
	// MemoryMiB and CPUs size the machine.
	MemoryMiB, CPUs int
	// Network says what the guest can reach. The zero value is nothing.
	Network Network
	// BootTimeout bounds the time from power-on to the agent's first answer.
	BootTimeout time.Duration
}

// File is one file for the guest, from a path of the publisher or from
// memory.
type File struct {
	// Name is the slash-separated path below FilesDir.
	Name string
	// Source is a path on the publisher's side; without it Data is used.
	Source string
	Data   []byte
	// Mode is 0o644 when zero.
	Mode fs.FileMode
}

// Network is a guest's way out.
type Network int

// The networks a guest can have.
const (
	// NoNetwork is no network card at all.
	NoNetwork Network = iota
	// Isolated is a network card with DHCP behind which nobody answers.
	Isolated
	// HostOnly is a network card through which the publisher's own services
	// on 127.0.0.1 answer at HostAddress, and whatever else the publisher's
	// machine can reach.
	HostOnly
)

// HostAddress is the publisher's machine as a guest with HostOnly sees it.
const HostAddress = "10.0.2.2"

// Machine is one running guest. Its methods may be called concurrently. All
// errors are a BrokenError unless the method says otherwise.
type Machine interface {
	Guest
	Power
	// Console is all text the kernel and its first programs printed on the
	// serial line since Boot, over restarts, without control sequences.
	Console() (string, error)
	// Close cuts the power and removes everything the machine used. It may
	// be called twice.
	Close() error
}

// Tunable is a Machine whose kernel can be told something else at its next
// start: what a person types at a boot loader.
type Tunable interface {
	// Append replaces Spec.Append from the next Reboot, Reset or PowerCut on.
	Append(words ...string)
}

// Guest is the way into a running machine.
type Guest interface {
	// Run runs one program and waits for its end. A program that fails, or
	// runs into its time limit, is a Result and not an error. When the guest
	// restarts meanwhile the error is ErrGuestRebooted.
	Run(ctx context.Context, c Command) (Result, error)
	// Put writes a file; it is complete and has its mode when Put returns.
	Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error
	// BootID is the kernel's random id of the current boot, as the agent
	// last reported it. It does not ask the guest.
	BootID() string
}

// Power is what can be done to a machine from outside. Reboot, Reset and
// PowerCut return when the agent answers again, with another boot id.
type Power interface {
	// Reboot asks the guest to restart in an orderly way.
	Reboot(ctx context.Context) error
	// Reset presses the reset button.
	Reset(ctx context.Context) error
	// PowerCut takes the power away without warning and gives it back.
	PowerCut(ctx context.Context) error
	// Link plugs the network cable in or pulls it.
	Link(ctx context.Context, up bool) error
	// Await returns when the agent answers with a boot id other than the
	// given one: for a restart that the guest decided on itself.
	Await(ctx context.Context, notBootID string) error
}

// Command is one program to run in the guest.
type Command struct {
	// Argv is run as given, without a shell; a bare name is looked up in the
	// guest's PATH.
	Argv  []string
	Stdin []byte
	// Env is added to the agent's small environment.
	Env []string
	// Timeout is DefaultTimeout when zero; then the whole process group is
	// killed and the Result says so.
	Timeout time.Duration
	// MaxOutput is DefaultMaxOutput when zero.
	MaxOutput int
}

// Result is what became of a Command.
type Result struct {
	// Exit is the exit status, or 128 and the signal that ended it, or 127
	// when the program could not be started (the reason is in Stderr).
	Exit           int
	Stdout, Stderr []byte
	// Truncated: more was printed than the limit allowed.
	Truncated bool
	TimedOut  bool
	Took      time.Duration
}
