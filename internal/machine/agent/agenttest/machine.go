// SPDX-License-Identifier: Apache-2.0

// Package agenttest is a world for the agent in tests: a machine's files with
// a kernel that takes livepatches (Machine), a publisher (Publisher) and a
// server (Server). They keep the contracts of package agent's interfaces and
// can be told to misbehave.
package agenttest

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/trust"
)

// Machine is a captured Debian machine with a loader that looks after a
// kernel made of files: what it loads appears below sys/kernel/livepatch.
type Machine struct {
	Root   string // of the captured tree
	Kernel kernel.Build
	Anchor *trust.Anchor // the loader's own; nil: it takes any manifest

	mu     sync.Mutex
	t      testing.TB
	status loaderapi.Status
	began  time.Time
	loads  int
	writes atomic.Int64 // names of files on their way

	// Transition is how long one takes; Never makes it stall until canceled.
	Transition time.Duration
	Never      bool
	// Refuse is the answer to the next loads; nil loads.
	Refuse error
	// Drop loads and then loses the answer, as a loader killed late does.
	Drop bool
	// Away is a loader that does not answer at all.
	Away bool
	// Blocking is the answer to Blockers.
	Blocking []loaderapi.Blocker
	// Traced is the answer to Tracers.
	Traced string
	// NoTracers is a kernel that does not tell.
	NoTracers bool
}

// BuildID is the build id of the captured machine.
const BuildID = "cafe0123456789abcdef0123456789abcdef0123"

// NewMachine captures a Debian 12 machine that has just booted.
func NewMachine(t testing.TB) *Machine {
	t.Helper()
	id, err := kernel.ParseBuildID(BuildID)
	if err != nil {
		t.Fatal(err)
	}
	m := &Machine{
		Root: t.TempDir(), t: t,
		Kernel: kernel.Build{Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-cloud-amd64", ID: id},
	}
	raw, err := hex.DecodeString(BuildID)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"proc/sys/kernel/osrelease":                string(m.Kernel.Release) + "\n",
		"proc/sys/kernel/hostname":                 "db1\n",
		"proc/sys/kernel/random/boot_id":           "boot-1\n",
		"proc/sys/kernel/tainted":                  "0\n",
		"sys/kernel/notes":                         "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00" + string(raw),
		"sys/kernel/warn_count":                    "0\n",
		"sys/kernel/oops_count":                    "0\n",
		"sys/kernel/security/lockdown":             "[none] integrity confidentiality\n",
		"sys/module/module/parameters/sig_enforce": "N\n",
		"etc/os-release":                           "ID=debian\nVERSION_ID=\"12\"\n",
		"boot/vmlinuz-" + string(m.Kernel.Release): "",
	} {
		m.Write(name, content)
	}
	m.status = loaderapi.Status{Kernel: m.Kernel, Boot: loaderapi.BootState{Outcome: "nothing_stored"}}
	m.status.Kernel.Distro = ""
	return m
}

// Write replaces one file of the tree, whole: nobody who reads a file of the
// kernel ever finds it empty.
func (m *Machine) Write(name, content string) {
	m.t.Helper()
	p := filepath.Join(m.Root, name)
	next := filepath.Join(m.Root, fmt.Sprintf(".next-%d", m.writes.Add(1)))
	if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(next, []byte(content), 0o644), os.Rename(next, p)); err != nil { //nolint:forbidigo // a test's tree
		m.t.Error(err)
	}
}

// Remove deletes files of the tree.
func (m *Machine) Remove(name string) {
	m.t.Helper()
	if err := os.RemoveAll(filepath.Join(m.Root, name)); err != nil {
		m.t.Error(err)
	}
}

// Reboot boots the machine anew: what was confirmed is loaded again, an
// attempt in flight counts as a death.
func (m *Machine) Reboot(bootID string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Remove("sys/kernel/livepatch")
	m.Write("proc/sys/kernel/random/boot_id", bootID+"\n")
	m.Write("sys/kernel/warn_count", "0\n")
	m.Write("proc/sys/kernel/tainted", "0\n")
	m.status.Loaded, m.status.Attempt, m.status.Disabled = nil, nil, false
	m.status.Boot = loaderapi.BootState{Outcome: "nothing_stored"}
	if m.status.Highest != 0 {
		m.put(m.status.Highest, bootID, true)
		m.status.Boot.Outcome = "loaded"
	}
}

// Change changes what the loader says.
func (m *Machine) Change(f func(*loaderapi.Status)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&m.status)
}

// Set changes how the kernel and the loader behave.
func (m *Machine) Set(f func(*Machine)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m)
}

// Loads counts the livepatches that the kernel took.
func (m *Machine) Loads() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.loads
}

// put makes the kernel take a livepatch. The caller holds the lock.
func (m *Machine) put(s livepatch.Sequence, boot string, atBoot bool) {
	m.status.Loaded = &loaderapi.Loaded{Sequence: s, Enabled: true, Transition: true, Patched: true}
	m.status.Attempt = &loaderapi.Attempt{Sequence: s, BootID: boot, AtBoot: atBoot}
	m.began = time.Now()
	m.loads++
	m.show()
	if m.Transition > 0 && !m.Never {
		time.AfterFunc(m.Transition, m.Tick)
	}
}

// show writes what sysfs says now.
func (m *Machine) show() {
	const dir = "sys/kernel/livepatch"
	l := m.status.Loaded
	if l == nil {
		m.Remove(dir)
		return
	}
	if l.Transition && !m.Never && time.Since(m.began) >= m.Transition {
		l.Transition = false
	}
	name := filepath.Join(dir, l.Sequence.ModuleName())
	m.Write(name+"/vmlinux/patched", "1\n")
	m.Write(name+"/transition", flag(l.Transition))
	m.Write(name+"/enabled", flag(l.Enabled))
	if l.Transition {
		return
	}
	entries, err := os.ReadDir(filepath.Join(m.Root, dir))
	if err != nil {
		m.t.Error(err)
	}
	for _, e := range entries {
		if e.Name() != l.Sequence.ModuleName() {
			m.Remove(filepath.Join(dir, e.Name())) // replaced
		}
	}
}

func flag(b bool) string {
	if b {
		return "1\n"
	}
	return "0\n"
}

// Tick lets the kernel go on; a real one needs nobody to ask.
func (m *Machine) Tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.show()
}

// TakeOut is root taking the livepatch out by hand.
func (m *Machine) TakeOut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status.Loaded, m.status.Attempt, m.status.Disabled = nil, nil, true
	m.show()
}

func (m *Machine) answer(err error) (loaderapi.Status, error) {
	if m.Away {
		return loaderapi.Status{}, fault.New(fault.Unavailable, "loader_unreachable", "connect to the loader: no such file")
	}
	m.show()
	return m.status, err
}

// Load verifies as far as a fake can and puts the livepatch in.
func (m *Machine) Load(_ context.Context, manifest, module *os.File) (loaderapi.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Away {
		return m.answer(nil)
	}
	if m.Refuse != nil {
		return m.answer(m.Refuse)
	}
	signed, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", manifest.Fd()))
	if err != nil {
		return m.answer(err)
	}
	man, err := m.Anchor.OpenManifest(signed)
	if err != nil {
		return m.answer(err)
	}
	if st, err := module.Stat(); err != nil || st.Size() != man.Module.Bytes {
		return m.answer(fault.New(fault.Untrusted, "module_truncated", "module has another size"))
	}
	have := m.status.Highest
	if l := m.status.Loaded; l != nil {
		have = max(have, l.Sequence)
		if l.Transition {
			return m.answer(fault.New(fault.Conflict, "transition_running", "a transition runs"))
		}
	}
	if err := livepatch.CheckReplace(have, man.Sequence); err != nil {
		return m.answer(err)
	}
	boot, err := os.ReadFile(filepath.Join(m.Root, "proc/sys/kernel/random/boot_id"))
	if err != nil {
		return m.answer(err)
	}
	m.put(man.Sequence, string(boot[:len(boot)-1]), false)
	m.status.Loaded.Fixes = man.Fixes
	if m.Drop {
		m.Drop = false
		return loaderapi.Status{}, errors.New("read the answer: connection reset by peer")
	}
	return m.answer(nil)
}

// Status tells what the loader knows.
func (m *Machine) Status(context.Context) (loaderapi.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.answer(nil)
}

// Recall takes recalls, without asking who signed them.
func (m *Machine) Recall(_ context.Context, f *os.File) (loaderapi.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := io.ReadAll(f)
	if err != nil {
		return m.answer(err)
	}
	text, _, _ := bytes.Cut(b, []byte("\n\n"))
	r, err := livepatch.ParseRecalls(append(text, '\n'))
	if err == nil && !m.Away {
		m.status.Recalls = r.Version
	}
	return m.answer(err)
}

// Confirm raises the highest sequence.
func (m *Machine) Confirm(_ context.Context, s livepatch.Sequence) (loaderapi.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.show()
	l := m.status.Loaded
	switch {
	case m.Away:
	case l == nil || l.Sequence != s:
		return m.answer(fault.New(fault.NotFound, "not_loaded", "sequence %d is not in the kernel", s))
	case l.Transition:
		return m.answer(fault.New(fault.Conflict, "not_done", "sequence %d is not done", s))
	default:
		m.status.Highest, m.status.Attempt = max(m.status.Highest, s), nil
	}
	return m.answer(nil)
}

// Cancel reverses a transition.
func (m *Machine) Cancel(_ context.Context, s livepatch.Sequence) (loaderapi.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.show()
	if l := m.status.Loaded; l == nil || l.Sequence != s || !l.Transition {
		return m.answer(fault.New(fault.Conflict, "not_running", "no transition of sequence %d", s))
	}
	m.status.Loaded, m.status.Attempt = nil, nil
	return m.answer(nil)
}

// Blockers lists who is in the way.
func (m *Machine) Blockers(context.Context) ([]loaderapi.Blocker, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Blocking, nil
}

// Tracers tells who else is attached to functions.
func (m *Machine) Tracers(context.Context) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.NoTracers {
		return "", errors.New("no debugfs")
	}
	_, err := m.answer(nil)
	return m.Traced, err
}
