// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/efi"
	"klatch/internal/forge/lab/guest"
)

// Names in a machine's folder. The emulator runs in that folder, so that no
// path on its command line is long.
const (
	consoleName = "console.log"
	initrdName  = "initrd.cpio"
	overlayName = "root.qcow2"
	filesName   = "files.ext4"
)

// maxConsole bounds what Console reads; the end is kept. A guest that prints
// for ever fills the publisher's disk, not the memory.
const maxConsole = 16 << 20

var (
	_ lab.Tunable = (*machine)(nil)
	_ lab.Flasher = (*machine)(nil)
)

// machine is one virtual machine over all its restarts.
type machine struct {
	rig     *Rig
	spec    lab.Spec
	dir     string
	options []option // all but the kernel
	kernel  boot     // without spec.Append
	uefi    *uefi    // nil: the emulator gets the kernel

	power  sync.Mutex // one change of power at a time
	mu     sync.Mutex // of what follows and spec.Append
	now    *process   // nil before the first start and after Close
	bootID string
	flash  []efi.Variable // for the next start
}

// start switches the power on.
func (m *machine) start() error {
	var args []string
	for _, o := range m.options {
		args = append(args, o.args()...)
	}
	kernel := m.kernel
	m.mu.Lock()
	kernel.commandLine = slices.Concat(kernel.commandLine, m.spec.Append)
	flash := m.flash
	m.flash = nil
	m.mu.Unlock()
	if m.uefi == nil {
		args = append(args, kernel.args()...)
	} else if err := m.uefi.prepare(m.dir, kernel, flash); err != nil {
		return err
	} else {
		args = append(args, m.uefi.args()...)
	}
	p, err := startProcess(m.rig.cfg.Program, args, m.dir)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.now = p
	m.mu.Unlock()
	go m.follow(p)
	return nil
}

// follow waits for the end of a process. When the guest restarted itself,
// the machine goes on with another process.
func (m *machine) follow(p *process) {
	defer close(p.followed)
	if !p.endedByReset() {
		return
	}
	m.power.Lock()
	defer m.power.Unlock()
	if now, err := m.process(); err != nil || now != p {
		return // closed, or somebody changed the power meanwhile
	}
	m.rig.cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, "lab machine restarts",
		slog.String("name", m.spec.Name), slog.String("how", "by itself"))
	if err := m.start(); err != nil {
		p.successorErr = err
	}
}

// process is the current one.
func (m *machine) process() (*process, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now == nil {
		return nil, errors.New("machine is closed")
	}
	return m.now, nil
}

// explain makes an error of the line or the monitor tell the real cause: the
// guest restarted, the emulator ended, or what the console says last.
func (m *machine) explain(p *process, err error, what string) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, guest.ErrLineClosed) {
		select { // the line closes a moment before the emulator is gone
		case <-p.ended:
		case <-time.After(endLimit):
		}
	}
	select {
	case <-p.ended:
		if p.endedByReset() {
			err = lab.ErrGuestRebooted
			break
		}
		how := cmp.Or(p.err, errors.New("switched off"))
		err = fmt.Errorf("emulator ended (%w): %w: %s", err, how, strings.TrimSpace(p.stderr.String()))
	default:
		if text, cerr := m.Console(); cerr == nil && !errors.Is(err, lab.ErrGuestRebooted) {
			err = fmt.Errorf("%w; the console ends with %q", err, lastLines(text, 3))
		}
	}
	return lab.Brokenf(err, "%s on %s", what, m.spec.Name)
}

// maxRestarts is how often a guest may restart itself while somebody waits
// for its agent. A machine may come up only after a livepatch has brought it
// down twice; a machine that does it more often never stops.
const maxRestarts = 4

// errNotInTime is a guest whose agent is not heard of.
var errNotInTime = errors.New("not within")

// await waits for the agent's first word of a boot other than notBootID, and
// follows the machine over restarts.
func (m *machine) await(ctx context.Context, notBootID string, restarts int) error {
	limit := m.spec.BootTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w %v", errNotInTime, limit))
	defer cancel()
	if m.uefi != nil {
		var refused context.CancelCauseFunc
		ctx, refused = context.WithCancelCause(ctx)
		defer refused(nil)
		go m.watchFirmware(ctx, refused)
	}
	for {
		p, err := m.process()
		if err != nil {
			return err
		}
		hello, err := p.client.Await(ctx, notBootID)
		if err == nil {
			m.mu.Lock()
			m.bootID = hello.BootID
			m.mu.Unlock()
			return nil
		}
		err = m.explain(p, err, "wait for the guest agent")
		if !errors.Is(err, lab.ErrGuestRebooted) {
			return err
		}
		if restarts--; restarts < 0 {
			text, cerr := m.Console()
			return &lab.BrokenError{What: "wait for the guest agent on " + m.spec.Name,
				Err: errors.Join(fmt.Errorf("guest restarts instead; the console ends with %q", lastLines(text, 3)), cerr)}
		}
		<-p.followed
		if p.successorErr != nil {
			return p.successorErr
		}
	}
}

// Run implements lab.Guest.
func (m *machine) Run(ctx context.Context, c lab.Command) (lab.Result, error) {
	p, err := m.process()
	if err != nil {
		return lab.Result{}, lab.Brokenf(err, "run on %s", m.spec.Name)
	}
	res, err := p.client.Run(ctx, c)
	return res, m.explain(p, err, "run")
}

// Put implements lab.Guest.
func (m *machine) Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error {
	p, err := m.process()
	if err != nil {
		return lab.Brokenf(err, "put on %s", m.spec.Name)
	}
	return m.explain(p, p.client.Put(ctx, path, mode, content), "put")
}

// BootID implements lab.Guest.
func (m *machine) BootID() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.now != nil {
		if h := m.now.client.Hello(); h.BootID != "" {
			m.bootID = h.BootID
		}
	}
	return m.bootID
}

// Reboot implements lab.Power.
func (m *machine) Reboot(ctx context.Context) error {
	p, err := m.process()
	if err != nil {
		return lab.Brokenf(err, "reboot of %s", m.spec.Name)
	}
	before := m.BootID()
	err = m.explain(p, p.client.Reboot(ctx), "reboot")
	if err != nil && !errors.Is(err, lab.ErrGuestRebooted) { // it may be faster than its answer
		return err
	}
	return m.Await(ctx, before)
}

// Reset implements lab.Power. For the guest there is no difference to a
// power cut: a real reset button leaves the memory as it was, but a kernel
// starts without looking at it.
func (m *machine) Reset(ctx context.Context) error { return m.powerCycle(ctx, "reset") }

// PowerCut implements lab.Power. What the guest wrote and the emulator took
// is kept even without a flush, because it is in the host's page cache: real
// power cuts are worse.
func (m *machine) PowerCut(ctx context.Context) error { return m.powerCycle(ctx, "power cut") }

func (m *machine) powerCycle(ctx context.Context, how string) error {
	before := m.BootID()
	if err := m.offAndOn(); err != nil {
		return lab.Brokenf(err, "%s of %s", how, m.spec.Name)
	}
	m.rig.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "lab machine restarts",
		slog.String("name", m.spec.Name), slog.String("how", how))
	return m.Await(ctx, before)
}

func (m *machine) offAndOn() error {
	m.power.Lock()
	defer m.power.Unlock()
	p, err := m.process()
	if err != nil {
		return err
	}
	if err := p.stop(); err != nil {
		return err
	}
	return m.start()
}

// Await implements lab.Power.
func (m *machine) Await(ctx context.Context, notBootID string) error {
	return lab.Brokenf(m.await(ctx, notBootID, maxRestarts), "await restart of %s", m.spec.Name)
}

// Append implements lab.Tunable.
func (m *machine) Append(words ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.spec.Append = slices.Clone(words)
}

// Flash implements lab.Flasher.
func (m *machine) Flash(changes ...efi.Variable) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flash = append(m.flash, changes...)
}

// Link implements lab.Power.
func (m *machine) Link(ctx context.Context, up bool) error {
	p, err := m.process()
	if err == nil && m.spec.Network == lab.NoNetwork {
		err = errors.New("machine has no network card")
	}
	if err != nil {
		return lab.Brokenf(err, "set link of %s", m.spec.Name)
	}
	err = p.qmp.do(ctx, "set_link", map[string]any{"name": nicID, "up": up})
	return m.explain(p, err, "set link")
}

// Console implements lab.Machine.
func (m *machine) Console() (string, error) {
	f, err := os.Open(filepath.Join(m.dir, consoleName))
	if err != nil {
		return "", lab.Brokenf(err, "read console of %s", m.spec.Name)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	st, err := f.Stat()
	if err != nil {
		return "", lab.Brokenf(err, "read console of %s", m.spec.Name)
	}
	skip := max(0, st.Size()-maxConsole)
	raw, err := io.ReadAll(io.NewSectionReader(f, skip, maxConsole))
	if err != nil {
		return "", lab.Brokenf(err, "read console of %s", m.spec.Name)
	}
	return lab.CleanConsole(raw), nil
}

// Close implements lab.Machine.
func (m *machine) Close() error {
	m.power.Lock()
	defer m.power.Unlock()
	m.mu.Lock()
	p := m.now
	m.now = nil
	m.mu.Unlock()
	var err error
	if p != nil {
		err = p.stop()
	}
	return lab.Brokenf(errors.Join(err, os.RemoveAll(m.dir)), "close %s", m.spec.Name)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
