// SPDX-License-Identifier: Apache-2.0

package player_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/lab/player/playertest"
	"klatch/internal/forge/lab/story"
	"klatch/internal/livepatch"
)

// play plays a text on a machine without an emulator.
func play(t *testing.T, rig *playertest.Rig, text string, change func(*player.Play)) player.Outcome {
	t.Helper()
	s, err := story.Parse("try.txtar", []byte("# A try.\n"+text), player.Grammar())
	if err != nil {
		t.Fatal(err)
	}
	p := player.Play{Story: s, Subject: player.Subject{Built: playertest.Built(2), Checks: map[cve.ID][]byte{playertest.Flaw: []byte("#!/bin/sh\n")}}}
	if change != nil {
		change(&p)
	}
	pl, err := player.New(p)
	if err != nil {
		t.Fatal(err)
	}
	m, err := rig.Boot(t.Context(), lab.Spec{})
	if err != nil {
		t.Fatal(err)
	}
	return pl.Run(t.Context(), m)
}

const warning = "[    5.000000] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x1/0x2\n"

func TestEachCommandHoldsOrNot(t *testing.T) {
	for _, c := range []struct {
		name, text string
		rig        playertest.Rig
		verdict    lab.Verdict
		why        string
	}{
		{"a livepatch loads", "load\nawait-transition\nloaded this", playertest.Rig{}, lab.Pass, ""},
		{"a load that must be refused and is not", "! load", playertest.Rig{}, lab.Fail, "which it must refuse"},
		{"a load that must be refused and is", "! load", playertest.Rig{Refuses: true}, lab.Pass, ""},
		{"a transition of nothing", "await-transition", playertest.Rig{}, lab.Fail, "no livepatch is in the kernel"},
		{"a transition with a limit", "load\nawait-transition 2s", playertest.Rig{Stuck: true}, lab.Fail, "did not come within 2s"},
		{"what is loaded and must not be", "load\nloaded none", playertest.Rig{}, lab.Fail, `the kernel has ["klatch_2"]`},
		{"an unload that must be refused", "load\n! unload", playertest.Rig{}, lab.Pass, ""},
		{"an unload of nothing", "unload", playertest.Rig{}, lab.Fail, "unload klatch_2"},
		{"nothing to cancel", "load\ncancel", playertest.Rig{}, lab.Fail, "no transition to cancel"},
		{"a transition that is canceled", "load\ncancel\nloaded none", playertest.Rig{Stuck: true}, lab.Pass, ""},
		{"a tracer that is found", "trace kprobe only\nexpect-tracer kprobe both_work\ntrace-end", playertest.Rig{}, lab.Pass, ""},
		{"a tracer that is found otherwise", "trace kprobe only\nexpect-tracer kprobe refused", playertest.Rig{}, lab.Broken, "both work"},
		{"a function that cannot be traced", "trace fentry only", playertest.Rig{Untraced: true}, lab.Broken, "no such function"},
		{"no replaced function can be traced", "trace fentry\nexpect-tracer bpf sleepers\ntrace-end", playertest.Rig{Untraced: true}, lab.Pass, ""},
		{"nothing is traced", "expect-tracer bpf sleepers", playertest.Rig{}, lab.Broken, "nothing is traced"},
		{"a stall with its class", "load\nexpect-stall unreliable_stack only", playertest.Rig{Stuck: true}, lab.Pass, ""},
		{"a stall of one of two classes", "load\nexpect-stall kernel_thread,unreliable_stack", playertest.Rig{Stuck: true}, lab.Pass, ""},
		{"a stall with another class", "load\nexpect-stall kernel_thread", playertest.Rig{Stuck: true}, lab.Fail, "blocked by task 7"},
		{"a stall in another function", "load\nexpect-stall unreliable_stack other", playertest.Rig{Stuck: true}, lab.Fail, "blocked by task 7"},
		{"a stall that is none", "load\nexpect-stall unreliable_stack", playertest.Rig{}, lab.Fail, "no task holds the transition up"},
		{"an earlier one that is not there is the story's mistake", "load earlier", playertest.Rig{}, lab.Broken, "needs: earlier"},
		{"a program that works", "run echo hello\nstdout ^hello$\n! stdout bye\nstderr ^$", playertest.Rig{}, lab.Pass, ""},
		{"a program that fails", "run false", playertest.Rig{}, lab.Fail, "false ended with status 1"},
		{"a program that must fail", "! run false", playertest.Rig{}, lab.Pass, ""},
		{"a program that must fail and does not", "! run echo", playertest.Rig{}, lab.Fail, "must fail"},
		{"a program that says that the lab lacks something", "run lacks", playertest.Rig{}, lab.Broken, "the lab lacks something"},
		{"output that does not match", "run echo hello\nstdout bye", playertest.Rig{}, lab.Fail, `"hello" does not match "bye"`},
		{"a variable", "run echo ${THIS} ${RELEASE}\nstdout '^klatch_2 6.1.0-50-cloud-amd64$'", playertest.Rig{}, lab.Pass, ""},
		{"a program that goes on", "start echo a\nrun echo ${PID}\nstdout ^77$\nstop\nstdout ^ended$", playertest.Rig{}, lab.Pass, ""},
		{"nothing to stop", "stop", playertest.Rig{}, lab.Broken, "nothing was started"},
		{"a condition that holds", "[check] run false", playertest.Rig{}, lab.Fail, "status 1"},
		{"a condition that does not", "[!check] run false\n[modules] run false\nrun echo", playertest.Rig{}, lab.Pass, ""},
		{"the log says what it must", "load\nconsole 'WARNING: CPU'\nconsole-allow ^WARNING", playertest.Rig{WarnOnLoad: warning}, lab.Pass, ""},
		{"the log says what it must not", "load\n! console WARNING\nconsole-allow ^WARNING", playertest.Rig{WarnOnLoad: warning}, lab.Fail, "does not match"},
		{"the log of before does not count", "console 'Linux version'", playertest.Rig{}, lab.Fail, "does not match"},
		{"trouble that nobody expects", "load\nconsole-allow ^INFO", playertest.Rig{WarnOnLoad: warning}, lab.Fail, "WARNING"},
		{"trouble before a restart is the livepatch's", "load\nreboot", playertest.Rig{WarnOnLoad: warning}, lab.Fail, "WARNING"},
		{"work twice at once", "busy 2s\nbusy 2s", playertest.Rig{}, lab.Broken, "busy already"},
		{"an end without a beginning", "busy-end", playertest.Rig{}, lab.Broken, "it is not busy"},
		{"a probe out of order", "leak-probe again", playertest.Rig{}, lab.Broken, "begin, again, end"},
		{"many calls", "load\ncheck fixed 1000", playertest.Rig{Works: true}, lab.Pass, ""},
		{"a story over its time is no livepatch's fault", "timeout: 5s\nsleep 1h", playertest.Rig{}, lab.Broken, "did not end within 5s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				out := play(t, &c.rig, c.text, nil)
				if out.Verdict != c.verdict || !strings.Contains(out.Why, c.why) {
					t.Errorf("%s: %s; want %s: %s", out.Verdict, out.Why, c.verdict, c.why)
				}
			})
		})
	}
}

// TestALargeLivepatchMayTakeLong: the kernel takes functions back one by one,
// and the write that asks for it lasts as long.
func TestALargeLivepatchMayTakeLong(t *testing.T) {
	for _, c := range []struct {
		name      string
		functions int
		back      time.Duration
		verdict   lab.Verdict
		why       string
	}{
		{"many, and slow", 400, 2 * time.Minute, lab.Pass, ""},
		{"few, and slow", 1, 2 * time.Minute, lab.Fail, "enabled did not end within 45.25s"},
		{"many, and without end", 400, time.Hour, lab.Fail, "did not end within 2m25s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				out := play(t, &playertest.Rig{Back: c.back}, "timeout: 3m\nload\ndisable\nunload\nload\ndisable", func(p *player.Play) {
					p.Built.Functions = make([]livepatch.Function, c.functions)
				})
				if out.Verdict != c.verdict || !strings.Contains(out.Why, c.why) {
					t.Errorf("%s: %s; want %s: %s", out.Verdict, out.Why, c.verdict, c.why)
				}
			})
		})
	}
}

// TestWhatAGuestSaysIsCut: a guest may print as much as it likes; a verdict
// holds the end of it.
func TestWhatAGuestSaysIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := play(t, &playertest.Rig{Says: strings.Repeat("evil ", 200_000) + "the end"}, "load\ncheck fixed", nil)
		if out.Verdict != lab.Fail || len(out.Why) > 2000 || !strings.Contains(out.Why, "the end") {
			t.Errorf("%s in %d bytes: %.300s", out.Verdict, len(out.Why), out.Why)
		}
	})
}

// TestTypeInformationThatCannotBeLookedFor: a table that cannot be read is no
// table without type information.
func TestTypeInformationThatCannotBeLookedFor(t *testing.T) {
	table := filepath.Join(t.TempDir(), "table")
	lacks := func() string {
		why, err := player.Play{Subject: player.Subject{Tables: player.Tables{Vmlinux: table}}}.Lacks("btf")
		if err != nil {
			return "error"
		}
		return why
	}
	if got := lacks(); got != "error" {
		t.Errorf("a table that is not there: %q", got)
	}
	for text, want := range map[string]string{playertest.Symbols: "the kernel has no type information", playertest.Symbols + "  10: 0 0 NOTYPE GLOBAL DEFAULT 1 __start_BTF\n": ""} {
		if err := os.WriteFile(table, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lacks(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	out := play(t, &playertest.Rig{}, "[btf] run echo", func(p *player.Play) { p.Tables.Vmlinux = filepath.Join(t.TempDir(), "nothing") })
	if out.Verdict != lab.Broken || !strings.Contains(out.Why, "could not be found out") {
		t.Errorf("%s: %s", out.Verdict, out.Why)
	}
}

func TestTheGuestGetsWhatTheStoryNeeds(t *testing.T) {
	s, err := story.Parse("try.txtar", []byte("# A try.\ncpus: 3\nmemory: 700\nload\n-- tool --\n#!/bin/sh\n"), player.Grammar())
	if err != nil {
		t.Fatal(err)
	}
	p := player.Play{Story: s, Taken: []lab.File{{Name: "bin/x", Data: []byte("x"), Mode: 0o755}},
		Subject: player.Subject{Built: playertest.Built(2), Earlier: []build.Result{playertest.Built(1)}, Checks: map[cve.ID][]byte{playertest.Flaw: []byte("c")}}}
	pl, err := player.New(p)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := pl.Spec("image")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range spec.Files {
		names = append(names, f.Name)
	}
	if want := []string{"bin/x", "check-CVE-2026-0001", "klatch_1.ko", "klatch_2.ko", "tool"}; !slices.Equal(names, want) || spec.CPUs != 3 || spec.MemoryMiB != 700 || spec.Kernel != "image" {
		t.Errorf("files %q, %+v", names, spec)
	}
	p.Taken = append(p.Taken, lab.File{Name: "klatch_2.ko", Data: []byte("another")})
	if pl, err = player.New(p); err != nil {
		t.Fatal(err)
	}
	if _, err := pl.Spec("image"); err == nil || !strings.Contains(err.Error(), "two files for the guest are called klatch_2.ko") {
		t.Errorf("a story that brings its own livepatch under our name: %v", err)
	}
}

func TestOneCommandForAPerson(t *testing.T) {
	s, err := story.Parse("try.txtar", []byte("# A try.\nload\n"), player.Grammar())
	if err != nil {
		t.Fatal(err)
	}
	pl, err := player.New(player.Play{Story: s, Subject: player.Subject{Built: playertest.Built(2), Checks: map[cve.ID][]byte{playertest.Flaw: []byte("c")}}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := (&playertest.Rig{Works: true}).Boot(t.Context(), lab.Spec{})
	if err != nil {
		t.Fatal(err)
	}
	if out := pl.Run(t.Context(), m); out.Verdict != lab.Pass {
		t.Fatalf("%+v", out)
	}
	for line, want := range map[string]string{"check fixed 3": "1 checks, 3 calls each", "check flaw": "does not show", "chek": "is unknown", "": "no commands"} {
		note, err := pl.Command(t.Context(), line)
		if err != nil {
			note = err.Error()
		}
		if !strings.Contains(note, want) {
			t.Errorf("%q: %s, want %s", line, note, want)
		}
	}
}

// FuzzGrammar: no text makes the language of the player panic.
func FuzzGrammar(f *testing.F) {
	f.Add([]byte("# a\n[check] ! load ${THIS}\nleak-probe end 5\ncheck fixed 3\nconsole '('\nsleep ${BUSY}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := story.Parse("x.txtar", text, player.Grammar())
		if err == nil && len(s.Steps) == 0 {
			t.Error("a story without commands")
		}
	})
}
