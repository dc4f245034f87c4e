// SPDX-License-Identifier: Apache-2.0

// Package playertest is a rig without an emulator: its machines know just what
// our stories ask of a guest, and can be made to misbehave in one way each.
// The real rig is tried with the same stories by the tests with tag vm.
package playertest

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
)

// Flaw is what Built fixes, Release and ID the kernel that all machines run.
const (
	Flaw    = cve.ID("CVE-2026-0001")
	Release = "6.1.0-50-cloud-amd64"
)

// ID is the build id of the kernel of Built.
var ID = [20]byte{1}

// Built is a livepatch that was built.
func Built(seq livepatch.Sequence) build.Result {
	return build.Result{Result: build.Built, Sequence: seq, Kernel: Release, Fixes: []cve.ID{Flaw},
		Match:   match.Report{Replaced: []match.Proved{{Object: "vmlinux", Function: "same", Position: 2}, {Object: "vmlinux", Function: "only"}}},
		BuildID: ID, Module: &build.Module{Path: seq.ModuleName() + ".ko", SHA256: fmt.Sprintf("%064d", seq)}}
}

// Symbols is a builder's table in the order of a linker: "same" is there
// three times, and the first by address is the last here.
const Symbols = `
Symbol table '.symtab' contains 9 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     0: 0000000000000000     0 NOTYPE  LOCAL  DEFAULT  UND 
     1: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS a.c
     2: ffffffff81000300    16 FUNC    LOCAL  DEFAULT    1 same
     3: ffffffff81000400    16 OBJECT  LOCAL  DEFAULT    3 same
     4: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS b.c
     5: ffffffff81000200    16 FUNC    LOCAL  DEFAULT    1 same
     6: ffffffff81000100    16 FUNC    GLOBAL DEFAULT    1 only
     7: ffffffff81000000     0 NOTYPE  GLOBAL DEFAULT    1 _text
     8: 0000000000000040     8 OBJECT  LOCAL  DEFAULT    2 percpu
     9: ffffffff81000500     8 OBJECT  LOCAL  DEFAULT    3 variable
`

// Running is the same kernel, moved by 16 MiB, with what it does not say in
// the table.
const Running = `0000000000000040 A percpu
ffffffff82000000 T _text
ffffffff82000100 T only
ffffffff82000200 t same
ffffffff82000300 t same
ffffffff82000400 d same
ffffffffc0001000 t same	[m]
ffffffffc0001010 t other	[m]
`

// Table writes Symbols to a file.
func Table(t testing.TB) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "table")
	if err := durable.WriteFile(file, []byte(Symbols), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// Packed is a text as a guest sends its symbols.
func Packed(text string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write([]byte(text))
	_ = z.Close()
	return b.Bytes()
}

// Rig makes machines that behave as it says.
type Rig struct {
	Digest string // what lab.Identity says

	Works      bool   // the livepatch fixes the flaw
	Flawless   bool   // the kernel never had the flaw
	Stuck      bool   // the transition never ends
	Quick      bool   // the transition is over before it can be canceled
	Sticky     bool   // a canceled livepatch leaves its code behind
	Leaks      bool   // each call of the new code keeps an object
	Refuses    bool   // the kernel takes no livepatch
	Sick       bool   // what runs on it goes wrong while a livepatch is loaded
	Gone       bool   // after a restart the livepatch does not load any more
	Sleeps     bool   // the new code may sleep with a lock held
	Second     bool   // the second call of the new code oopses
	Kallsyms   string // empty: Running
	Listing    string // empty: what Built says; %s is the livepatch's folder
	WarnOnLoad string // on the console
	WarnAtBoot string
	Taint      int           // of the kernel, once a livepatch was loaded
	OtherBuild bool          // it runs another build of the same release
	Jump       time.Duration // the guest's clock, once a livepatch was loaded
	Resets     bool          // it restarts by itself, silently, once a check ran on a livepatch
	Late       time.Duration // the guest counts less than goes by
	Back       time.Duration // how long it takes to take the livepatch back; the write blocks
	Dead       error         // nothing boots
	Says       string        // what a check prints where the flaw shows
	Cut        string        // the line is cut at a command that contains this
	boots      int64         //nolint:modernize // atomic.Int64 must not be copied, and tables of rigs are
	Untraced   bool          // no function can be traced
	OnBoot     func(s lab.Spec)
}

// Identity implements lab.Identity.
func (r *Rig) Identity(context.Context) (string, error) { return r.Digest, nil }

// Boot implements lab.Rig.
func (r *Rig) Boot(_ context.Context, s lab.Spec) (lab.Machine, error) {
	atomic.AddInt64(&r.boots, 1)
	if r.OnBoot != nil {
		r.OnBoot(s)
	}
	if r.Dead != nil {
		return nil, lab.Brokenf(r.Dead, "boot")
	}
	return &machine{Rig: r, refuses: r.Refuses, bootID: 1, console: "[    0.000000] Linux version 6.1\n" + r.WarnAtBoot}, nil
}

type machine struct {
	*Rig
	mu              sync.Mutex
	loaded, modules []string
	refuses         bool
	sticks          bool
	calls           int
	uptime          time.Duration
	wall            time.Duration
	console         string
	bootID          int
	began           time.Time
}

func (m *machine) Run(ctx context.Context, c lab.Command) (lab.Result, error) {
	m.mu.Lock()
	line := strings.Join(c.Argv, " ")
	if m.Cut != "" && strings.Contains(line, m.Cut) {
		m.mu.Unlock()
		return lab.Result{}, lab.Brokenf(errors.New("line closed"), "run")
	}
	if strings.Contains(line, "klatch-lab-load") {
		sick := m.Sick
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return lab.Result{}, context.Cause(ctx)
		case <-time.After(1100 * time.Millisecond): // the story gives the work a second before it loads
		}
		if sick {
			return lab.Result{Exit: 1, Stderr: []byte("files: read 3 bytes back, wrote 4")}, nil
		}
		return lab.Result{Stdout: []byte("files 9\n")}, nil
	}
	defer m.mu.Unlock()
	return m.run(c, line)
}

func say(exit int, format string, args ...any) (lab.Result, error) {
	return lab.Result{Exit: exit, Stdout: fmt.Appendf(nil, format, args...)}, nil
}

func (m *machine) run(c lab.Command, line string) (lab.Result, error) {
	m.uptime += 500 * time.Millisecond
	switch {
	case strings.Contains(line, "/sys/kernel/notes"):
		return m.readings()
	case strings.HasPrefix(line, "cut "):
		return say(0, "%.2f\n", m.uptime.Seconds())
	case line == "gzip -c /proc/kallsyms":
		return say(0, "%s", Packed(cmp.Or(m.Kallsyms, Running)))
	case c.Argv[0] == "find":
		return say(0, "%s", strings.ReplaceAll(cmp.Or(m.Listing, "%s/vmlinux/same,2\n%s/vmlinux/only,1\n"), "%s", c.Argv[1]))
	case c.Argv[0] == "insmod":
		return m.insmod(c.Argv[1])
	case strings.HasPrefix(line, "sh -c insmod"):
		if res, err := m.insmod(c.Argv[4]); err != nil || res.Exit != 0 {
			return res, err
		}
		if m.Quick {
			return say(9, "")
		}
		m.sticks, m.loaded = m.Sticky, nil
		return say(0, "0\n")
	case strings.HasSuffix(line, "/transition"):
		return say(0, "%d\n", map[bool]int{true: 1}[m.Stuck && len(m.loaded) > 0])
	case strings.HasSuffix(line, "/enabled") && c.Argv[0] == "cat":
		return say(0, "1\n")
	case strings.HasPrefix(line, "sh -c echo 0 > "):
		if limit := cmp.Or(c.Timeout, lab.DefaultTimeout); m.Back > limit {
			<-time.After(limit)
			return lab.Result{Exit: 128 + 9, TimedOut: true}, nil
		}
		<-time.After(m.Back)
		m.loaded = nil
		return say(0, "")
	case line == "ls /sys/kernel/livepatch/":
		return say(0, "%s\n", strings.Join(m.loaded, "\n"))
	case c.Argv[0] == "rmmod":
		if slices.Contains(m.loaded, c.Argv[1]) || !slices.Contains(m.modules, c.Argv[1]) {
			return say(1, "")
		}
		m.modules = slices.DeleteFunc(m.modules, func(n string) bool { return n == c.Argv[1] })
		return say(0, "")
	case strings.Contains(line, "drop_caches"):
		kept := map[bool]int{true: m.calls}[m.Leaks]
		// Slabs that CPUs work on, and stacks that are freed late, are no leaks.
		return say(0, "== slabs\nslabinfo - version: 2.1\nkmalloc-64 %d 5000 64 64 1\nanon_vma_chain %d 5000 64 64 1\nvmap_area %d 5000 72 56 1\n"+
			"== zones\n  pagesets\n    cpu: 0\n              count: %d\n    cpu: 1\n              count: 0\n"+
			"== memory\nMemTotal: 100000 kB\nMemFree: %d kB\n", 1000+kept, 1000+min(m.calls/100, 2)*64, m.calls, m.calls, 50000-4*m.calls)
	case strings.HasSuffix(line, "check-"+string(Flaw)):
		return m.check(1)
	case len(c.Argv) == 7 && strings.HasSuffix(c.Argv[4], "check-"+string(Flaw)):
		n, err := strconv.Atoi(c.Argv[5])
		if err != nil {
			return lab.Result{}, err
		}
		return m.check(n)
	case strings.HasSuffix(c.Argv[0], "/watch.sh"): // of may-sleep.txtar
		return say(map[bool]int{true: 1}[m.Sleeps && c.Argv[1] == "after"], "note: looked at 7 calls that may sleep\n")
	case c.Argv[0] == "echo":
		return say(0, "%s\n", strings.Join(c.Argv[1:], " "))
	case c.Argv[0] == "false":
		return say(1, "")
	case c.Argv[0] == "lacks":
		return say(75, "no such device")
	case strings.HasPrefix(line, "sh -c cd /sys/kernel/tracing && echo"), strings.HasPrefix(line, `sh -c rm -f "$4"`):
		if m.Untraced {
			return lab.Result{Exit: 1, Stderr: []byte("no such function")}, nil
		}
		return say(0, "")
	case strings.HasPrefix(line, `sh -c if [ -f "$1.pid" ]`):
		return say(0, "")
	case strings.HasPrefix(line, "cat /sys/kernel/debug/kprobes/list"):
		return say(0, "-  k  only+0x0    [FTRACE]\nonly (1) R    \ttramp: - (kprobe_ftrace_handler+0x0/0x1b0)\n")
	case strings.HasPrefix(line, "sh -c cd /sys/kernel/livepatch/$1"):
		if m.Stuck {
			return say(0, "task 7 7\n7 (cat) S 1 7 7 0 -1 4194304 0\n[<0>] only+0x1/0x2\n")
		}
		return say(0, "")
	case strings.HasPrefix(line, "sh -c out=$1"):
		return say(0, "77\n")
	case strings.HasPrefix(line, "sh -c kill -TERM"):
		return say(0, "ended")
	}
	return lab.Result{}, fmt.Errorf("the fake guest does not know %q", line)
}

func (m *machine) readings() (lab.Result, error) {
	if m.began.IsZero() {
		m.began = time.Now()
	}
	id := ID
	if m.OtherBuild {
		id[0]++
	}
	notes := binary.LittleEndian.AppendUint32(nil, 4)
	notes = binary.LittleEndian.AppendUint32(notes, 20)
	notes = binary.LittleEndian.AppendUint32(notes, 3)
	notes = append(append(notes, "GNU\x00"...), id[:]...)
	up := time.Since(m.began) + time.Minute
	wall := up + m.wall
	if len(m.modules) > 0 || m.calls > 0 {
		wall += m.Jump
		up -= m.Late
		wall -= m.Late
	}
	taint := 0
	if len(m.modules) > 0 || m.calls > 0 {
		taint = 1<<12 | m.Taint
	}
	boot := m.bootID
	if m.Resets && m.calls > 0 {
		boot++
	}
	return say(0, "%s\n%.2f\n%d\n%d\n%d\n%s", Release, up.Seconds(), int(wall.Seconds()), boot, taint, notes)
}

func (m *machine) insmod(file string) (lab.Result, error) {
	name := strings.TrimSuffix(filepath.Base(file), ".ko")
	if m.refuses {
		return lab.Result{Exit: 1, Stderr: []byte("Invalid module format")}, nil
	}
	if slices.Contains(m.modules, name) {
		return lab.Result{Exit: 1, Stderr: []byte("File exists")}, nil
	}
	m.loaded, m.modules, m.calls = []string{name}, append(m.modules, name), 0 // replace is set
	m.console += m.WarnOnLoad
	return say(0, "")
}

func (m *machine) check(n int) (lab.Result, error) {
	if len(m.loaded) > 0 {
		if m.calls += n; m.Second && m.calls > 1 {
			m.console += "[    6.000000] BUG: kernel NULL pointer dereference, address: 0000000000000008\n"
			return lab.Result{Exit: 137}, nil
		}
	}
	if m.Flawless || m.sticks || m.Works && len(m.loaded) > 0 {
		return say(0, "EOPNOTSUPP")
	}
	return say(1, "%s", cmp.Or(m.Says, "ok"))
}

func (m *machine) Put(context.Context, string, fs.FileMode, io.Reader) error {
	return errors.ErrUnsupported
}
func (m *machine) BootID() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strconv.Itoa(m.bootID)
}
func (m *machine) Console() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.console, nil
}
func (m *machine) Close() error { return nil }
func (m *machine) Reboot(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.loaded, m.modules, m.refuses, m.sticks = nil, nil, m.Gone, false
	m.bootID++
	m.console += "[    0.000000] Linux version 6.1\n"
	return nil
}
func (m *machine) Reset(context.Context) error         { return errors.ErrUnsupported }
func (m *machine) PowerCut(context.Context) error      { return errors.ErrUnsupported }
func (m *machine) Link(context.Context, bool) error    { return errors.ErrUnsupported }
func (m *machine) Await(context.Context, string) error { return errors.ErrUnsupported }

// Boots counts the machines that were started.
func (r *Rig) Boots() int { return int(atomic.LoadInt64(&r.boots)) }
