// SPDX-License-Identifier: Apache-2.0

// Package board is the Rig of real hardware: one board, reached over a line
// (serial port, a socket of somebody who has it, or a program such as ssh),
// with its power in the hands of commands. It starts nothing but those
// programs and writes nothing but its lock and a temporary console file.
//
// Read Boot first, then machine.ready: a board is used only after it has
// shown that it runs the wanted kernel, and that what this kernel prints is
// seen here. A kernel whose oops nobody sees would pass everything.
package board

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/framed"
	"klatch/internal/forge/lab/guest"
)

// Config says which board, and how.
type Config struct {
	File File
	// Scratch holds the console; the system's temporary folder when empty.
	Scratch string
	// Log is told about starts and ends; nothing is logged when nil.
	Log *slog.Logger
}

// Rig is one board.
type Rig struct {
	cfg  Config
	busy chan struct{} // holds a token while a machine of this process has the board
}

var _ lab.Rig = (*Rig)(nil)

// New makes the rig. It does not touch the board.
func New(cfg Config) (*Rig, error) {
	if cfg.File.Name == "" || cfg.File.Lock == "" {
		return nil, errors.New("board without name or lock: read its file with Load")
	}
	if cfg.Scratch == "" {
		cfg.Scratch = os.TempDir()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Rig{cfg: cfg, busy: make(chan struct{}, 1)}, nil
}

// About says that results of this rig come from hardware.
func (r *Rig) About() lab.About { return lab.About{Kind: lab.Hardware, Name: r.cfg.File.Name} }

// Boot implements lab.Rig. There is one board: a second Boot waits until the
// machine of the first is closed. When another process has the board, Boot
// fails at once and says who.
func (r *Rig) Boot(ctx context.Context, s lab.Spec) (lab.Machine, error) {
	m, err := r.boot(ctx, s)
	if err != nil {
		return nil, lab.Brokenf(err, "boot %s on board %s", s.Name, r.cfg.File.Name)
	}
	if r.cfg.File.Kernel.says("{append}") {
		return tunable{m}, nil
	}
	return m, nil
}

// settled: a board that goes on restarting while it is made ready is broken.
// The console may know more, and is asked by whoever judges.
func settled(err error) error {
	if errors.Is(err, lab.ErrGuestRebooted) {
		return &lab.BrokenError{What: "make the board ready", Err: fmt.Errorf("it restarts by itself: %s", err)} //nolint:errorlint // hides it on purpose
	}
	return err
}

func (r *Rig) boot(ctx context.Context, s lab.Spec) (_ *machine, err error) {
	began := time.Now()
	want, err := r.check(s)
	if err != nil {
		return nil, err
	}
	select {
	case r.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the board, which this process uses: %w", context.Cause(ctx))
	}
	unlock, err := lock(r.cfg.File.Lock)
	if err != nil {
		<-r.busy
		return nil, err
	}
	m := &machine{rig: r, spec: s, want: want, bootLimit: max(s.BootTimeout, seconds(r.cfg.File.BootSeconds)),
		unlock: func() error { err := unlock(); <-r.busy; return err }}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if m.console, err = newConsole(r.cfg.Scratch); err != nil {
		return nil, err
	}
	// Whatever the last user left on the board goes with its power.
	if err := m.powerOff(ctx); err != nil {
		return nil, err
	}
	m.connect()
	if err := m.powerOn(ctx); err != nil {
		return nil, err
	}
	m.client = guest.NewClient(m.link)
	if err := m.await(ctx, ""); err != nil {
		return nil, err
	}
	r.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "board booted", slog.String("board", r.cfg.File.Name),
		slog.String("name", s.Name), slog.Duration("took", time.Since(began)))
	return m, nil
}

// connect opens the line, and that of the console when it is another one.
func (m *machine) connect() {
	m.line = newLine(m.rig.cfg.File.Line)
	if c := m.rig.cfg.File.Console; c != nil {
		m.consoleLine = newLine(*c)
		m.copying.Go(m.copyConsole)
		m.link = framed.New(m.line, discard{})
		return
	}
	m.link = framed.New(m.line, m.console)
}

// discard takes what a login program says on a line without a console.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// check refuses what a board cannot do, before it is touched.
func (r *Rig) check(s lab.Spec) (want version, err error) {
	switch {
	case s.Root != "" || s.Initrd != "":
		return want, errors.New("a board has its own disk and initramfs; it cannot take those of the spec")
	case s.Firmware != nil:
		return want, errors.New("a board has its own firmware; the spec asks for another")
	case s.Network != lab.NoNetwork:
		return want, errors.New("a board has the network that it is plugged into; the spec asks for another")
	case len(s.Append) > 0 && !r.cfg.File.Kernel.says("{append}"):
		return want, fmt.Errorf("kernel command line %q is wanted, and kernel.choose of the board's file does not use {append}", s.Append)
	}
	var total int64
	names := map[string]bool{}
	for _, f := range s.Files {
		n, err := checkFile(f)
		if err != nil {
			return want, err
		}
		if names[f.Name] {
			return want, fmt.Errorf("file %q is there twice", f.Name)
		}
		names[f.Name] = true
		if total += n; total > maxFiles {
			return want, fmt.Errorf("files of more than %d bytes", maxFiles)
		}
	}
	return imageVersion(s.Kernel)
}
