// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player/playertest"
)

func TestARunIsPlayedAgainFromWhatWasRecorded(t *testing.T) { synctest.Test(t, testReplay) }

func testReplay(t *testing.T) {
	dir := t.TempDir()
	text := "# It holds by what it takes.\nneeds: check\neach: earlier\ntake: words\nload earlier\nload\ncheck flaw\nrun echo ${EARLIER}\nstdout ^klatch_1$\n"
	for name, content := range map[string]string{"own.txtar": text, "words": "some words"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	only, own, err := Resolve([]string{filepath.Join(dir, "own.txtar")})
	if err != nil {
		t.Fatal(err)
	}
	rig := &playertest.Rig{}
	tr := trialOf(t, rig, built(1))
	tr.Own, tr.Only = own, only
	res := run(t, tr)
	if len(res.Scenarios) != 1 || res.Scenarios[0].Name != "file/own-sequence-1" || res.Scenarios[0].Verdict != lab.Pass || res.Scenarios[0].Required {
		t.Fatalf("%+v", res.Scenarios)
	}
	name := res.Scenarios[0].Run
	before, err := os.ReadFile(filepath.Join(tr.Dir, name, resultName))
	if err != nil {
		t.Fatal(err)
	}

	// Everything of the publisher's is gone or other, and the livepatch works now.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	rig.Works, tr.Own, tr.Only, tr.Checks = true, nil, nil, nil
	var files []string
	rig.OnBoot = func(s lab.Spec) {
		for _, f := range s.Files {
			files = append(files, f.Name+" "+string(f.Data))
		}
	}
	builds := []build.Result{built(1), built(2)}
	s, err := Replay(t.Context(), tr, name, builds)
	if err != nil || s.Verdict != lab.Fail || !strings.Contains(s.Why, "does not show") || s.Digest != res.Scenarios[0].Digest || s.Name != res.Scenarios[0].Name {
		t.Errorf("%v, %+v", err, s)
	}
	if want := []string{"check-CVE-2026-0001 #!/bin/sh\n", "klatch_1.ko ", "klatch_2.ko ", "words some words"}; !slices.Equal(files, want) {
		t.Errorf("the guest got %q", files)
	}
	if after, err := os.ReadFile(filepath.Join(tr.Dir, name, resultName)); err != nil || string(after) != string(before) {
		t.Errorf("a replay changed what was judged: %v", err)
	}
	for _, f := range []string{replayFile, replayConsole} {
		if _, err := os.Stat(filepath.Join(tr.Dir, name, f)); err != nil {
			t.Error(err)
		}
	}

	other := built(2)
	other.Module.SHA256 = strings.Repeat("d", 64)
	for _, c := range []struct {
		what string
		run  string
		with []build.Result
		code fault.Code
	}{
		{"another module", name, []build.Result{built(1), other}, "inputs_changed"},
		{"no earlier one", name, []build.Result{built(2)}, "inputs_changed"},
		{"no build", name, nil, "no_build"},
		{"no such run", "own-0123456789ab", builds, "no_run"},
		{"a path", "../" + name, builds, "bad_run"},
	} {
		if _, err := Replay(t.Context(), tr, c.run, c.with); fault.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %s", c.what, err, c.code)
		}
	}
	content, err := filepath.Glob(filepath.Join(tr.Dir, contentDir, "*"))
	if err != nil || len(content) != 2 {
		t.Fatalf("content %q, %v", content, err)
	}
	for _, f := range append(content, filepath.Join(tr.Dir, name, storyFile)) {
		old, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, append(slices.Clone(old), ' '), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Replay(t.Context(), tr, name, builds); fault.CodeOf(err) != "bad_run" {
			t.Errorf("%s was changed: %v", filepath.Base(f), err)
		}
		if err := os.WriteFile(f, old, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestThePublishersOwnStories(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, "scenarios", name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const fine = "# Fine.\nload\n"
	write("all/cancel.txtar", fine) // called as one of ours
	write("series/debian-6.1/a.txtar", fine)
	write("series/debian-6.12/b.txtar", fine)
	write("fix/CVE-2026-0001/c.txtar", fine)
	write("fix/CVE-2026-0002/d.txtar", fine)
	own, err := Own(dir, "debian-6.1", playertest.Built(2).Fixes)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range own {
		names = append(names, s.name())
	}
	if want := []string{"all/cancel", "series/debian-6.1/a", "fix/CVE-2026-0001/c"}; !slices.Equal(names, want) {
		t.Errorf("found %q", names)
	}
	write("all/bad.txtar", "# Bad.\nlaod\n")
	if _, err := Own(dir, "debian-6.1", nil); err == nil || !strings.Contains(err.Error(), "bad.txtar:2: command \"laod\" is unknown") {
		t.Errorf("a story with a mistake: %v", err)
	}
	write("all/bad.txtar", "# Takes too much.\ntake: link\nload\n")
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "scenarios", "all", "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := Own(dir, "debian-6.1", nil); err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("a link out of the folder: %v", err)
	}
	if _, _, err := Resolve([]string{filepath.Join(dir, "none.txtar")}); fault.CodeOf(err) != "no_story" {
		t.Errorf("no such file: %v", err)
	}
}
