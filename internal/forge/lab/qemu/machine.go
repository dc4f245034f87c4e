// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"klatch/internal/forge/lab"
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

// Numbers of the inherited sockets: the first two after stdin, stdout and
// stderr.
const (
	agentFD   = 3
	monitorFD = 4
)

const (
	// maxConsole bounds what Console reads; the end is kept. A guest that
	// prints for ever fills the publisher's disk, not the memory.
	maxConsole = 16 << 20
	// endLimit is what a killed emulator may take to be gone.
	endLimit = 20 * time.Second
)

// machine is one virtual machine over all its restarts.
type machine struct {
	rig     *Rig
	spec    lab.Spec
	dir     string
	options []option

	power  sync.Mutex // one change of power at a time
	mu     sync.Mutex
	now    *process // nil before the first start and after Close
	bootID string
}

// process is the machine from power-on to power-off.
type process struct {
	cmd    *exec.Cmd
	client *guest.Client
	qmp    *qmp
	stderr tail
	ended  chan struct{} // closed when the emulator is gone
	err    error         // how it went; read after ended
}

// start switches the power on.
func (m *machine) start() error {
	agentOurs, agentTheirs, err := socketPair()
	if err != nil {
		return err
	}
	defer agentTheirs.Close()
	monitorOurs, monitorTheirs, err := socketPair()
	if err != nil {
		return errors.Join(err, agentOurs.Close())
	}
	defer monitorTheirs.Close()

	var args []string
	for _, o := range m.options {
		args = append(args, o.args()...)
	}
	// Not CommandContext: the machine outlives the call that started it.
	cmd := exec.Command(m.rig.cfg.Program, args...) //nolint:noctx // Close ends it
	cmd.Dir = m.dir
	cmd.ExtraFiles = []*os.File{agentTheirs, monitorTheirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.stderr, &p.stderr
	if err := p.startAndReap(); err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", m.rig.cfg.Program, err), agentOurs.Close(), monitorOurs.Close())
	}
	p.client, p.qmp = guest.NewClient(agentOurs), newQMP(monitorOurs)
	m.mu.Lock()
	m.now = p
	m.mu.Unlock()
	return nil
}

// startAndReap starts the emulator on a thread of its own and keeps that
// thread until the emulator ends: the kernel sends the parent-death signal
// when the starting *thread* ends (prctl(2), PR_SET_PDEATHSIG), and the Go
// runtime ends idle threads as it likes.
func (p *process) startAndReap() error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	return <-started
}

// stop takes the power away and waits until the emulator is gone.
func (p *process) stop() error {
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	_ = p.client.Close()
	p.qmp.close()
	select {
	case <-p.ended:
		return nil
	case <-time.After(endLimit):
		return fmt.Errorf("emulator %d does not die", p.cmd.Process.Pid)
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
// emulator's end, or what the console says last.
func (m *machine) explain(p *process, err error, what string) error {
	if err == nil || errors.Is(err, lab.ErrGuestRebooted) {
		return lab.Brokenf(err, "%s on %s", what, m.spec.Name)
	}
	select {
	case <-p.ended:
		err = fmt.Errorf("emulator ended (%w): %v: %s", err, p.err, strings.TrimSpace(p.stderr.String()))
	case <-time.After(200 * time.Millisecond): // the line closes a moment before
		if text, cerr := m.Console(); cerr == nil {
			err = fmt.Errorf("%w; the console ends with %q", err, lastLines(text, 3))
		}
	}
	return lab.Brokenf(err, "%s on %s", what, m.spec.Name)
}

// await waits for the agent's first word of a boot other than notBootID.
func (m *machine) await(ctx context.Context, notBootID string) error {
	p, err := m.process()
	if err != nil {
		return err
	}
	limit := m.spec.BootTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	hello, err := p.client.Await(ctx, notBootID)
	if err != nil {
		return m.explain(p, err, "wait for the guest agent")
	}
	m.mu.Lock()
	m.bootID = hello.BootID
	m.mu.Unlock()
	return nil
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
	return m.restart(ctx, "reboot", func(p *process) error { return p.client.Reboot(ctx) })
}

// Reset implements lab.Power.
func (m *machine) Reset(ctx context.Context) error {
	return m.restart(ctx, "reset", func(p *process) error { return p.qmp.do(ctx, "system_reset", nil) })
}

// PowerCut implements lab.Power. What the guest wrote and the emulator took
// is kept even without a flush, because it is in the host's page cache: real
// power cuts are worse.
func (m *machine) PowerCut(ctx context.Context) error {
	return m.restart(ctx, "power cut", func(p *process) error {
		if err := p.stop(); err != nil {
			return err
		}
		return m.start()
	})
}

// Await implements lab.Power.
func (m *machine) Await(ctx context.Context, notBootID string) error {
	return lab.Brokenf(m.await(ctx, notBootID), "await restart of %s", m.spec.Name)
}

func (m *machine) restart(ctx context.Context, what string, do func(*process) error) error {
	m.power.Lock()
	defer m.power.Unlock()
	p, err := m.process()
	if err != nil {
		return lab.Brokenf(err, "%s of %s", what, m.spec.Name)
	}
	before := m.BootID()
	if err := do(p); err != nil {
		return m.explain(p, err, what)
	}
	m.rig.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "lab machine restarts",
		slog.String("name", m.spec.Name), slog.String("how", what))
	return lab.Brokenf(m.await(ctx, before), "%s of %s", what, m.spec.Name)
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
	defer f.Close()
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

// socketPair gives our end as a connection with deadlines and the other as a
// file to inherit.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "lab"), os.NewFile(uintptr(fds[1]), "guest")
	conn, err := net.FileConn(ours)
	_ = ours.Close() // FileConn has its own copy
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// tail keeps the end of what the emulator prints.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const maxTail = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	if over := t.buf.Len() - maxTail; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
