// SPDX-License-Identifier: Apache-2.0

//go:build vm

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/catalog"
	"klatch/internal/forge/proof"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// publisher is a data folder and the real program.
type publisher struct {
	*testing.T
	program, dir, cache string
}

// forge runs the program; it must end with the given status.
func (p publisher) forge(status int, stdin string, args ...string) string {
	p.Helper()
	cmd := exec.CommandContext(p.Context(), p.program, append([]string{"--dir", p.dir, "--cache", p.cache, "--quiet"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		p.Fatal(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != status {
		p.Fatalf("%q ended with status %d, want %d\n%s%s", args, got, status, stdout.String(), stderr.String())
	}
	return stdout.String() + stderr.String()
}

func (p publisher) write(name, text string, mode os.FileMode) {
	p.Helper()
	file := filepath.Join(p.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), mode)); err != nil {
		p.Fatal(err)
	}
}

// TestTestFromTheCommandLine: list, one story, a story of the publisher's own
// with a program, the shell, a run again, as docs/reference/scenarios.md tells it.
func TestTestFromTheCommandLine(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	p := publisher{t, filepath.Join(t.TempDir(), "klatch-forge"), filepath.Join(t.TempDir(), "data"), k.Cache}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", p.program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, msg)
	}
	p.forge(0, "", "init", p.dir, "--profile", "lab")
	if err := catalog.Save(p.dir, k.Entry); err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile(filepath.Join(k.Tree.Source(), "fs/proc/cmdline.c"))
	if err != nil {
		t.Fatal(err)
	}
	before, _, _ := strings.Cut(string(source), "\tseq_putc(m, '\\n');")
	line := strings.Count(before, "\n") + 1
	release := string(k.Entry.Release)
	patch := filepath.Join(t.TempDir(), "fix.patch")
	if err := os.WriteFile(patch, []byte(oneLine("fs/proc/cmdline.c", strings.Split(string(source), "\n"), line, "\tseq_puts(m, \" livepatched\");")), 0o644); err != nil {
		t.Fatal(err)
	}
	check := filepath.Join(t.TempDir(), "check")
	if err := os.WriteFile(check, []byte("#!/bin/sh\ngrep -q livepatched /proc/cmdline\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.forge(0, "", "queue", "add", patch, "--series", k.Entry.Series, "--fixes", "CVE-2000-0001")
	p.forge(0, "", "queue", "check", "CVE-2000-0001", check, "--series", k.Entry.Series)
	p.forge(0, "", "build", "--kernel", release)

	p.write("scenarios/all/words.txtar", "# The command line keeps its words.\nneeds: check\ntake: tools/words\nload\nawait-transition\nrun tools/words\nstdout '^[1-9][0-9]* words$'\ndisable\nunload\n", 0o644)
	p.write("scenarios/all/tools/words", "#!/bin/sh\necho $(wc -w < /proc/cmdline) words\n", 0o755)
	p.write("scenarios/series/other/never.txtar", "# Not ours.\nrun false\n", 0o644)
	p.write("scenarios/fix/CVE-2000-0001/fails.txtar", "# It does not hold, on purpose.\nrequired: no\nload\nrun false\n", 0o644)

	t.Run("list", func(t *testing.T) {
		var listed struct {
			Version   int
			Scenarios []proof.Planned
		}
		if err := json.Unmarshal([]byte(p.forge(0, "", "test", "--kernel", release, "--list", "--json")), &listed); err != nil {
			t.Fatal(err)
		}
		state := func(name string) string {
			i := slices.IndexFunc(listed.Scenarios, func(s proof.Planned) bool { return s.Name == name })
			if i < 0 {
				return "absent"
			}
			s := listed.Scenarios[i]
			return map[bool]string{true: "required"}[s.Required] + " " + s.NotApplicable
		}
		for name, want := range map[string]string{"load-and-disable": "required ", "all/words": "required ", "fix/CVE-2000-0001/fails": " ",
			"replace": "required there is no earlier sequence", "never": "absent", "series/other/never": "absent"} {
			if got := state(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	})
	t.Run("a story of the publisher's own", func(t *testing.T) {
		out := p.forge(0, "", "test", "--kernel", release, "--scenario", "all/words")
		if !strings.Contains(out, "pass     all/words") || !strings.Contains(out, "the result for the gate is as it was") {
			t.Errorf("it says\n%s", out)
		}
		if out := p.forge(0, "", "test", "--kernel", release, "--scenario", "all/words"); !strings.Contains(out, "as before") {
			t.Errorf("again it says\n%s", out)
		}
		out = p.forge(3, "", "sign", "--kernel", release)
		if !strings.Contains(out, "(not_tested)") {
			t.Errorf("a part of the gate is enough to sign:\n%s", out)
		}
	})
	var run string
	t.Run("a story that fails, and a look at its machine", func(t *testing.T) {
		lines := "echo $((6 * 7)); false\ncd /sys/kernel/livepatch; export X=kept\nls; echo $X\n:loaded this\n:check fixed 2\n:loaded none\nif\necho still here\n:disable\nexit\necho never\n"
		out := p.forge(3, lines, "test", "--kernel", release, "--scenario", "fails", "--shell")
		for _, want := range []string{"42\n[status 1]\n", "klatch_1\nkept\n", "1 checks, 2 calls each\n", "want []", "still here\n", "fail     fix/CVE-2000-0001/fails",
			"at \"run false\": false ended with status 1", "run fix_CVE-2000-0001_fails-"} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in\n%s", want, out)
			}
		}
		if strings.Contains(out, "never") {
			t.Errorf("the shell goes on after its end:\n%s", out)
		}
		_, rest, _ := strings.Cut(out, "run fix_")
		run = "fix_" + strings.Fields(rest)[0]
	})
	t.Run("a run again", func(t *testing.T) {
		// What the data folder says today does not matter.
		if err := os.RemoveAll(filepath.Join(p.dir, "scenarios", "fix")); err != nil {
			t.Fatal(err)
		}
		if out := p.forge(3, "", "test", "--kernel", release, "--replay", run); !strings.Contains(out, "fail     fix/CVE-2000-0001/fails") {
			t.Errorf("it says\n%s", out)
		}
		p.forge(3, "", "test", "--kernel", release, "--replay", "cancel-0123456789ab")
		p.forge(2, "", "test", "--kernel", release, "--replay", "../../x-0123456789ab")
	})
}

// oneLine is a diff that puts a line before another.
func oneLine(file string, lines []string, before int, text string) string {
	return "--- a/" + file + "\n+++ b/" + file + "\n" + hunk(before) + " " + lines[before-2] + "\n+" + text + "\n " + lines[before-1] + "\n"
}

func hunk(before int) string { return fmt.Sprintf("@@ -%d,2 +%d,3 @@\n", before-1, before-1) }
