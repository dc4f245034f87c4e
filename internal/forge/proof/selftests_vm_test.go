// SPDX-License-Identifier: Apache-2.0

//go:build vm

package proof_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
	"klatch/internal/testkit/seeded"
)

const selftests = "../../../lab/selftests"

// prepareSelftests runs the script that a publisher would run, as the user of
// builds.
func prepareSelftests(t *testing.T, k kerneltest.Kernel) (dir string) {
	t.Helper()
	script, err := os.ReadFile(filepath.Join(selftests, "prepare"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err = os.MkdirTemp("/var/tmp", "klatch-selftests-") // the build user must reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := sandbox.Own(dir); err != nil {
		t.Fatal(err)
	}
	res, err := sandbox.Run(t.Context(), sandbox.Command{Dir: dir, Writable: []string{dir}, Stdin: bytes.NewReader(script),
		Argv: []string{"bash", "-s", k.Tree.Source(), string(k.Entry.Release), k.Entry.CC, dir}})
	if err != nil || res.Exit != 0 {
		t.Fatalf("prepare: %v, exit status %d: %s", err, res.Exit, res.Output)
	}
	return dir
}

// TestKernelSelftests runs the kernel's own livepatch selftests as a
// publisher's story, on a stock kernel, after a livepatch was in it. It takes
// minutes, most of it waiting in the guest, so CI runs it with one of the
// kernel's scripts; KLATCH_LONG runs all, and one that fails.
func TestKernelSelftests(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	dir := prepareSelftests(t, k)
	data := t.TempDir()
	own := filepath.Join(data, "scenarios/series", k.Entry.Series)
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(selftests, "kernel-selftests.txtar"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(own, "kernel-selftests.txtar"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(own, "selftests"), os.DirFS(filepath.Join(dir, "selftests"))); err != nil {
		t.Fatal(err)
	}
	scripts := filepath.Join(own, "selftests/scripts")
	passed := "22 tests passed, 0 files failed, 0 skipped"
	if os.Getenv(testkit.LongEnv) == "" {
		keepOnly(t, scripts, "functions.sh", "test-livepatch.sh")
		passed = "3 tests passed, 0 files failed, 0 skipped"
	}
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	built := seeded.Predecessor(t, k)
	play := func() proof.Scenario {
		t.Helper()
		sources, err := proof.Own(data, k.Entry.Series, built.Fixes)
		if err != nil || len(sources) != 1 {
			t.Fatalf("%d stories, %v", len(sources), err)
		}
		return played(t, proof.Trial{Rig: rig, Kernel: k.Tree.Image(), Built: built, Earlier: []build.Result{}, Own: sources, Parallel: 1,
			Only: []string{"series/" + k.Entry.Series + "/kernel-selftests"}, Dir: t.TempDir()})[0]
	}
	if s := play(); s.Verdict != lab.Pass || !strings.Contains(s.Note, passed) {
		t.Errorf("verdict %s: %s; %s", s.Verdict, s.Why, s.Note)
	}
	if os.Getenv(testkit.LongEnv) == "" {
		return
	}

	// The same with a kernel that does otherwise than they expect.
	keepOnly(t, scripts, "functions.sh", "test-livepatch.sh")
	file := filepath.Join(scripts, "test-livepatch.sh")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	wrong := strings.Replace(string(b), "completing patching transition", "completing the patching transition", 1)
	if wrong == string(b) {
		t.Fatal("the test does not say what it did")
	}
	if err := os.WriteFile(file, []byte(wrong), 0o755); err != nil {
		t.Fatal(err)
	}
	if s := play(); s.Verdict != lab.Fail || !strings.Contains(s.Why, "selftests.sh ended with status 1") {
		t.Errorf("a selftest that fails: verdict %s: %s", s.Verdict, s.Why)
	}
}

func keepOnly(t *testing.T, dir string, names ...string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !slices.Contains(names, f.Name()) {
			if err := os.Remove(filepath.Join(dir, f.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
}
