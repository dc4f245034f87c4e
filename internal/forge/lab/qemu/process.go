// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"klatch/internal/forge/lab/guest"
)

// Numbers of the inherited sockets: the first two after stdin, stdout and
// stderr.
const (
	agentFD   = 3
	monitorFD = 4
)

// endLimit is what a killed emulator may take to be gone.
const endLimit = 20 * time.Second

// process is the machine from power-on to power-off or restart.
type process struct {
	cmd    *exec.Cmd
	client *guest.Client
	qmp    *qmp
	stderr tail
	ended  chan struct{} // closed when the emulator is gone
	err    error         // how it went; read after ended

	followed     chan struct{} // closed when a successor runs, or none is wanted
	successorErr error         // read after followed
}

// startProcess starts the emulator in a folder, connected to us by two
// sockets that nobody else can find.
func startProcess(program string, args []string, dir string) (*process, error) {
	agentOurs, agentTheirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer agentTheirs.Close() //nolint:errcheck // the emulator has its own copy
	monitorOurs, monitorTheirs, err := socketPair()
	if err != nil {
		return nil, errors.Join(err, agentOurs.Close())
	}
	defer monitorTheirs.Close() //nolint:errcheck // as above

	// Not CommandContext: the machine outlives the call that started it.
	cmd := exec.Command(program, args...) //nolint:noctx // stop ends it
	cmd.Dir = dir
	cmd.ExtraFiles = []*os.File{agentTheirs, monitorTheirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, ended: make(chan struct{}), followed: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.stderr, &p.stderr
	if err := p.startAndReap(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", program, err), agentOurs.Close(), monitorOurs.Close())
	}
	p.client = guest.NewClient(agentOurs)
	if p.qmp, err = newQMP(monitorOurs); err != nil {
		err = errors.Join(err, p.stop())
		return nil, fmt.Errorf("%s says %q: %w", program, p.stderr.String(), err)
	}
	return p, nil
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

// endedByReset waits for the end and reports whether the guest wanted it,
// to start again.
func (p *process) endedByReset() bool {
	<-p.ended
	<-p.qmp.ended
	return p.err == nil && p.qmp.reason == guestReset
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
