// SPDX-License-Identifier: Apache-2.0

// Package qemu is the Rig of virtual machines: one QEMU process per machine,
// emulated, or with KVM where a probe has shown that KVM boots a kernel.
//
// Read Boot first, then machine.start and machine.follow. Every machine has its own folder in
// the scratch folder of the rig and nothing outside it; Close removes it.
// The emulator dies with this process: it is started with a parent-death
// signal, and it holds no socket or file that anybody else would find.
package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"klatch/internal/forge/lab"
)

// Config says what the rig may use. Guest is required.
type Config struct {
	// Guest is a static program for the guests that calls guest.Main when
	// guest.IsInit says so: klatch-forge itself.
	Guest string
	// Program is the emulator; qemu-system-x86_64 when empty.
	Program string
	// Busybox is a static busybox for the small guest; looked up when empty.
	Busybox string
	// Scratch holds the machines' folders; the system's temporary folder
	// when empty.
	Scratch string
	// Cache keeps the result of the KVM probe; nothing is kept when empty.
	Cache string
	// Accelerator is "tcg", "kvm", or empty to find out.
	Accelerator string
	// Log is told about starts and ends; nothing is logged when nil.
	Log *slog.Logger
}

// Rig makes virtual machines.
type Rig struct {
	patience time.Duration  // with a first boot; 0 is defaultBootTimeout
	started  func(*machine) // of tests: an emulator has begun

	cfg     Config
	probing sync.Mutex
	accel   accelerator // empty until known
}

var _ lab.Rig = (*Rig)(nil)

// Sizes and limits of a machine that does not ask.
const (
	defaultMemoryMiB   = 512
	defaultCPUs        = 2
	defaultBootTimeout = 2 * time.Minute
)

// New checks that the programs and files are there.
func New(cfg Config) (*Rig, error) {
	if cfg.Program == "" {
		cfg.Program = "qemu-system-x86_64"
	}
	if cfg.Busybox == "" {
		cfg.Busybox = "busybox"
	}
	for _, p := range []*string{&cfg.Program, &cfg.Busybox} {
		path, err := exec.LookPath(*p)
		if err != nil {
			return nil, lab.Brokenf(err, "look for %s", *p)
		}
		*p = path
	}
	for _, p := range []string{cfg.Guest, cfg.Busybox} {
		if err := mustBeStatic(p); err != nil {
			return nil, lab.Brokenf(err, "use %q in guests", p)
		}
	}
	if cfg.Scratch == "" {
		cfg.Scratch = os.TempDir()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	switch a := accelerator(cfg.Accelerator); a {
	case "", accelTCG, accelKVM:
		return &Rig{cfg: cfg, accel: a}, nil
	default:
		return nil, fmt.Errorf("accelerator %q: want tcg, kvm or nothing", cfg.Accelerator)
	}
}

// Boot implements lab.Rig.
func (r *Rig) Boot(ctx context.Context, s lab.Spec) (lab.Machine, error) {
	accel, err := r.accelerator(ctx, s.Kernel)
	if err != nil {
		return nil, lab.Brokenf(err, "boot %s", s.Name)
	}
	m, err := r.boot(ctx, s, accel)
	if errors.Is(err, errStill) && s.BootTimeout <= 0 && ctx.Err() == nil {
		r.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "lab machine stood still while it booted; once more", slog.String("name", s.Name), slog.Any("error", err))
		m, err = r.boot(ctx, s, accel)
	}
	if err != nil {
		return nil, lab.Brokenf(err, "boot %s", s.Name)
	}
	return m, nil
}

// errStill is a machine that stops in the middle of its first boot, with
// nothing wrong in its log: the emulator does that once in some two hundred
// boots on a busy host (bench/2026-11-26-boots.txt). Nothing was loaded yet, so
// one more try hides no fault of a livepatch.
var errStill = errors.New("it stood still")

func (r *Rig) boot(ctx context.Context, s lab.Spec, accel accelerator) (_ *machine, err error) {
	if s.BootTimeout <= 0 {
		s.BootTimeout = cmp.Or(r.patience, defaultBootTimeout)
	}
	began := time.Now()
	if err := checkSpec(s); err != nil {
		return nil, err
	}
	// The emulator runs in the machine's folder.
	for _, p := range []*string{&s.Kernel, &s.Initrd} {
		if *p != "" {
			if *p, err = filepath.Abs(*p); err != nil {
				return nil, err
			}
		}
	}
	if err := os.MkdirAll(r.cfg.Scratch, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(r.cfg.Scratch, "vm-*")
	if err != nil {
		return nil, err
	}
	m := &machine{rig: r, spec: s, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if m.options, m.kernel, err = r.prepare(ctx, s, accel, dir); err != nil {
		return nil, err
	}
	if s.Firmware != nil {
		if m.uefi, err = newUEFI(*s.Firmware); err != nil {
			return nil, err
		}
		m.flash = s.Firmware.Variables
	}
	if err := m.start(); err != nil {
		return nil, err
	}
	if r.started != nil {
		r.started(m)
	}
	if err := m.await(ctx, "", 0); err != nil {
		if text, cerr := m.Console(); cerr == nil && text != "" && len(lab.ScanConsole(text)) == 0 && errors.Is(err, errNotInTime) {
			err = errors.Join(err, errStill)
		}
		return nil, err
	}
	r.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "lab machine booted", slog.String("name", s.Name),
		slog.String("accelerator", string(accel)), slog.Duration("took", time.Since(began)))
	return m, nil
}

func checkSpec(s lab.Spec) error {
	for _, f := range []string{s.Kernel, s.Initrd, s.Root} {
		if f == "" && f != s.Kernel {
			continue
		}
		st, err := os.Stat(f)
		if err != nil {
			return err
		}
		if !st.Mode().IsRegular() {
			return fmt.Errorf("%s is not a file", f)
		}
	}
	if s.Root == "" && s.Initrd != "" {
		return errors.New("an initrd of your own needs a root disk")
	}
	return nil
}

// prepare makes the disks and the initramfs and says what the machine is; its
// kernel comes apart, because it can be told something else later.
func (r *Rig) prepare(ctx context.Context, s lab.Spec, accel accelerator, dir string) ([]option, boot, error) {
	options := []option{
		bare{},
		accel,
		size{memoryMiB: positive(s.MemoryMiB, defaultMemoryMiB), cpus: positive(s.CPUs, defaultCPUs)},
		consoleFile(consoleName),
		agentLine{fd: agentFD},
		monitor{fd: monitorFD},
	}
	initrd := s.Initrd
	if s.Root == "" {
		initrd = initrdName
		if err := r.writeSmallGuest(dir, s.Files); err != nil {
			return nil, boot{}, fmt.Errorf("make initramfs: %w", err)
		}
	} else {
		both, err := r.makeDisks(ctx, s, dir)
		if err != nil {
			return nil, boot{}, err
		}
		options = append(options, both)
	}
	switch s.Network {
	case lab.NoNetwork:
	case lab.Isolated:
		options = append(options, network{restricted: true})
	case lab.HostOnly:
		options = append(options, network{})
	}
	var words []string
	for _, o := range options {
		words = append(words, o.kernelArgs()...)
	}
	return options, boot{kernel: s.Kernel, initrd: initrd, commandLine: words}, nil
}

func positive(n, otherwise int) int {
	if n > 0 {
		return n
	}
	return otherwise
}

// command runs a helper program to its end; its output is for the error.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
