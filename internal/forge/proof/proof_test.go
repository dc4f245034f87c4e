// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
)

const flaw = cve.ID("CVE-2026-0001")

// fakeGuest is a machine that knows just what the scenarios ask. The real one is
// tried by the tests with tag vm, with the same scenarios.
type fakeGuest struct {
	loaded, modules []string
	works           bool // the livepatch fixes the flaw
	flawless        bool // the kernel never had the flaw
	stuck           bool // the transition never ends
	console         string
	warnOnLoad      string
	dead            error
	refuses         bool
	sick            bool   // what runs on it goes wrong while a livepatch is loaded
	gone            bool   // after a restart the livepatch does not load any more
	kallsyms        string // empty: that of the table
	listing         string // empty: that of the build
}

func (g *fakeGuest) Boot(context.Context, lab.Spec) (lab.Machine, error) {
	if g.dead != nil {
		return nil, lab.Brokenf(g.dead, "boot")
	}
	return g, nil
}

func (g *fakeGuest) Run(_ context.Context, c lab.Command) (lab.Result, error) {
	say := func(exit int, format string, args ...any) (lab.Result, error) {
		return lab.Result{Exit: exit, Stdout: fmt.Appendf(nil, format, args...)}, nil
	}
	line := strings.Join(c.Argv, " ")
	switch {
	case line == "uname -r":
		return say(0, "6.1.0-50-cloud-amd64\n")
	case strings.Contains(line, "klatch-lab-load"):
		time.Sleep(1100 * time.Millisecond) // the scenario gives the work a second before it loads
		if g.sick {
			return lab.Result{Exit: 1, Stderr: []byte("files: read 3 bytes back, wrote 4")}, nil
		}
		return say(0, "files 9\n")
	case line == "gzip -c /proc/kallsyms":
		return say(0, "%s", packed(cmp.Or(g.kallsyms, runningSymbols)))
	case c.Argv[0] == "find":
		return say(0, "%s", cmp.Or(g.listing, c.Argv[1]+"/vmlinux/same,2\n"+c.Argv[1]+"/vmlinux/only,1\n"))
	case strings.HasPrefix(line, "insmod "):
		if g.refuses {
			return lab.Result{Exit: 1, Stderr: []byte("Invalid module format")}, nil
		}
		name := strings.TrimSuffix(filepath.Base(c.Argv[1]), ".ko")
		g.loaded, g.modules = []string{name}, append(g.modules, name) // replace is set
		g.console += g.warnOnLoad
		return say(0, "")
	case strings.HasSuffix(line, "/transition"):
		return say(0, "%d\n", map[bool]int{true: 1}[g.stuck])
	case strings.HasSuffix(line, "/enabled") && c.Argv[0] == "cat":
		return say(0, "1\n")
	case c.Argv[0] == "sh":
		g.loaded = nil
		return say(0, "")
	case line == "ls /sys/kernel/livepatch":
		return say(0, "%s\n", strings.Join(g.loaded, "\n"))
	case c.Argv[0] == "rmmod":
		if slices.Contains(g.loaded, c.Argv[1]) || !slices.Contains(g.modules, c.Argv[1]) {
			return say(1, "")
		}
		g.modules = slices.DeleteFunc(g.modules, func(m string) bool { return m == c.Argv[1] })
		return say(0, "")
	case strings.HasSuffix(line, "check-"+string(flaw)):
		if g.flawless || g.works && len(g.loaded) > 0 {
			return say(checkFixed, "EOPNOTSUPP")
		}
		return say(checkFlaw, "ok")
	}
	return lab.Result{}, fmt.Errorf("the fake guest does not know %q", line)
}

func (g *fakeGuest) Put(context.Context, string, fs.FileMode, io.Reader) error {
	return errors.ErrUnsupported
}
func (g *fakeGuest) BootID() string           { return "boot" }
func (g *fakeGuest) Console() (string, error) { return g.console, nil }
func (g *fakeGuest) Close() error             { return nil }
func (g *fakeGuest) Reboot(context.Context) error {
	g.loaded, g.modules, g.refuses = nil, nil, g.gone
	return nil
}
func (g *fakeGuest) Reset(context.Context) error         { return errors.ErrUnsupported }
func (g *fakeGuest) PowerCut(context.Context) error      { return errors.ErrUnsupported }
func (g *fakeGuest) Link(context.Context, bool) error    { return errors.ErrUnsupported }
func (g *fakeGuest) Await(context.Context, string) error { return errors.ErrUnsupported }

func built(seq livepatch.Sequence) build.Result {
	return build.Result{Result: build.Built, Sequence: seq, Kernel: "6.1.0-50-cloud-amd64", Fixes: []cve.ID{flaw},
		Match:   match.Report{Replaced: []match.Proved{{Object: "vmlinux", Function: "same", Position: 2}, {Object: "vmlinux", Function: "only"}}},
		BuildID: [20]byte{1}, Module: &build.Module{Path: seq.ModuleName() + ".ko", SHA256: fmt.Sprintf("%064d", seq)}}
}

func try(t *testing.T, g *fakeGuest, checks map[cve.ID][]byte, earlier ...build.Result) Result {
	t.Helper()
	table := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(table, []byte(builtSymbols), 0o644); err != nil {
		t.Fatal(err)
	}
	res, err := Run(t.Context(), Trial{Rig: g, Built: built(2), Tables: Tables{Vmlinux: table}, Earlier: earlier, Checks: checks,
		Tell: func(string) func(string) { return func(string) {} }})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestVerdicts(t *testing.T) {
	checks := map[cve.ID][]byte{flaw: []byte("#!/bin/sh\n")}
	for _, c := range []struct {
		name    string
		guest   fakeGuest
		checks  map[cve.ID][]byte
		verdict lab.Verdict
		check   livepatch.Check
		last    string // scenario that decided
		why     string
	}{
		{"a good livepatch passes", fakeGuest{works: true}, checks, lab.Pass, livepatch.Passed, "load-after-reboot", ""},
		{"work that goes wrong on the patched machine is the livepatch's fault", fakeGuest{works: true, sick: true}, checks, lab.Fail, livepatch.Unchecked, "load-on-a-busy-machine", "read 3 bytes"},
		{"it must load again after a restart", fakeGuest{works: true, gone: true}, checks, lab.Fail, livepatch.Unchecked, "load-after-reboot", "Invalid module format"},
		{"one that loads and changes nothing fails", fakeGuest{}, checks, lab.Fail, livepatch.Unchecked, "flaws-gone-after", "still shows"},
		{"a check that shows nothing before proves nothing", fakeGuest{flawless: true}, checks, lab.Fail, livepatch.Unchecked, "flaws-show-before", "proves nothing"},
		{"a fix without a check is called unchecked", fakeGuest{works: true}, nil, lab.Pass, livepatch.Unchecked, "load-after-reboot", ""},
		{"the kernel's refusal is the livepatch's fault", fakeGuest{refuses: true}, checks, lab.Fail, livepatch.Unchecked, "load-from-clean", "Invalid module format"},
		{"the builder's table is of another kernel", fakeGuest{works: true, kallsyms: strings.Replace(runningSymbols, "ffffffff82000100", "ffffffff82000108", 1)},
			checks, lab.Fail, livepatch.Unchecked, "symbols", "only 1 is at 0xffffffff82000108"},
		{"the kernel replaced another function of the name", fakeGuest{works: true, listing: "/sys/kernel/livepatch/klatch_2/vmlinux/same,1\n/sys/kernel/livepatch/klatch_2/vmlinux/only,1\n"},
			checks, lab.Fail, livepatch.Unchecked, "positions", "same,1"},
		{"a kernel warning is the livepatch's fault", fakeGuest{works: true, warnOnLoad: "[    5.000000] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x1/0x2\n"},
			checks, lab.Fail, livepatch.Unchecked, "load-from-clean", "WARNING"},
		{"a lab that does not boot is broken, never a pass", fakeGuest{dead: errors.New("no emulator")}, checks, lab.Broken, livepatch.Unchecked, "boot", "no emulator"},
	} {
		t.Run(c.name, func(t *testing.T) {
			res := try(t, &c.guest, c.checks, built(1))
			last := res.Scenarios[len(res.Scenarios)-1]
			if res.Verdict != c.verdict || last.Name != c.last || !strings.Contains(last.Why, c.why) {
				t.Errorf("verdict %s at %s: %q; want %s at %s", res.Verdict, last.Name, last.Why, c.verdict, c.last)
			}
			got := livepatch.Unchecked
			for _, f := range res.Fixes {
				got = f.Check
			}
			if c.verdict != lab.Broken && got != c.check {
				t.Errorf("fix is %s, want %s", got, c.check)
			}
			dir := t.TempDir()
			if err := Keep(dir, res); err != nil {
				t.Fatal(err)
			}
			_, err := Read(dir, built(2))
			if (err == nil) != (c.verdict == lab.Pass) {
				t.Errorf("verdict %s can be signed: %v", res.Verdict, err == nil)
			}
		})
	}
}

func TestOnlyThisModulesResultCounts(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(dir, built(2)); fault.CodeOf(err) != "not_tested" {
		t.Errorf("no result at all: %v", err)
	}
	if err := Keep(dir, try(t, &fakeGuest{works: true}, nil)); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir, built(2)); err != nil {
		t.Errorf("own result: %v", err)
	}
	if _, err := Read(dir, built(3)); fault.CodeOf(err) != "not_tested" {
		t.Errorf("another module's result: %v", err)
	}
	other := built(2)
	other.BuildID[0] = 9
	if _, err := Read(dir, other); fault.CodeOf(err) != "not_tested" {
		t.Errorf("another kernel's result: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, resultFile), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir, built(2)); err == nil {
		t.Error("a torn result was read")
	}
}
