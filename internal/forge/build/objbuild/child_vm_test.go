// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit/kerneltest"
)

// childEnv names the file that tells a child process what to build.
const childEnv = "KLATCH_TEST_BUILD"

type childWork struct {
	Cache, Data string
	Plan        compose.Plan
	Tools       objbuild.Tools
}

// TestBuildInAChild is no test: it is the process that others start, to kill
// it or to run it as another user.
func TestBuildInAChild(t *testing.T) {
	file := os.Getenv(childEnv)
	if file == "" {
		t.Skip("only as a child of other tests")
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var w childWork
	if err := json.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	res, err := build.Run(context.WithoutCancel(t.Context()), &objbuild.Driver{Cache: w.Cache, Tools: w.Tools}, w.Plan, w.Data, build.NewClock(nil))
	if err != nil || res.Result != build.Built {
		t.Fatalf("%s, %v: %s %+v", res.Result, err, res.Error, res.Refusals)
	}
}

// planOfBoth is a plan that touches vmlinux and a module.
func planOfBoth(t *testing.T, k kerneltest.Kernel) compose.Plan {
	t.Helper()
	plan, err := compose.New(k.Entry, []queue.Patch{
		edit(t, k, namespaceC, func(s string) string { return nopAtDefinition(t, s, "proc_timens_set_offset") }),
		edit(t, k, "drivers/net/dummy.c", func(s string) string { return nopAtDefinition(t, s, "dummy_xmit") }),
	}, k.Tools.Version(), 1)
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

func must(t *testing.T, plan compose.Plan, cache, data string, tools objbuild.Tools) build.Result {
	t.Helper()
	res, err := build.Run(context.WithoutCancel(t.Context()), &objbuild.Driver{Cache: cache, Tools: tools}, plan, data, build.NewClock(nil))
	if err != nil || res.Result != build.Built || len(res.Functions) != 2 {
		t.Fatalf("%s, %v: %s %+v %v", res.Result, err, res.Error, res.Refusals, res.Functions)
	}
	return res
}

// child prepares the process; argv goes before the program.
func child(t *testing.T, w childWork, argv ...string) *exec.Cmd {
	t.Helper()
	b, err := json.Marshal(w)
	if err != nil {
		t.Fatal(err)
	}
	file, program := filepath.Join(w.Cache, "work.json"), filepath.Join(w.Cache, "test")
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(file, b, 0o644), os.WriteFile(program, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	argv = append(argv, program, "-test.run", "^TestBuildInAChild$")
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = w.Cache
	cmd.Env = append(os.Environ(), childEnv+"="+file)
	return cmd
}

// TestOtherFoldersUsersAndSettingsSameBytes: the second build has nothing in
// common with the first but the kernel, the queue and the tools.
func TestOtherFoldersUsersAndSettingsSameBytes(t *testing.T) {
	k := kerneltest.Prepared(t)
	plan := planOfBoth(t, k)
	first := must(t, plan, kerneltest.OtherCache(t, k, nil), t.TempDir(), k.Tools)
	want, err := os.ReadFile(first.Module.Path)
	if err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	for _, c := range []struct {
		name   string
		argv   []string
		nobody bool
	}{
		{"another time zone, language, host and number of processors", []string{"env", "TZ=Asia/Kolkata", "LC_ALL=tr_TR.UTF-8", "LANG=tr_TR.UTF-8",
			"unshare", "--uts", "taskset", "-c", "0", "bash", "-c", "hostname elsewhere; exec \"$@\"", "bash"}, false},
		{"another user", []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-c", "umask 022; exec \"$@\"", "bash"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			cache := kerneltest.OtherCache(t, k, nil)
			w := childWork{Cache: cache, Data: filepath.Join(cache, "data"), Plan: plan, Tools: k.Tools}
			for _, d := range []string{w.Data, filepath.Join(cache, "builds"), filepath.Join(cache, "objects")} {
				if err := os.MkdirAll(d, 0o755); err != nil {
					t.Fatal(err)
				}
				if c.nobody {
					if err := os.Chown(d, nobody, nobody); err != nil {
						t.Fatal(err)
					}
				}
			}
			if c.nobody { // the tree belongs to who builds, as it would on that user's machine
				giveTree(t, kerneltree.At(cache, k.Entry).Source(), nobody)
			}
			if out, err := child(t, w, c.argv...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			got, err := os.ReadFile(filepath.Join(build.Dir(w.Data, k.Entry.Release, 1), filepath.Base(first.Module.Path)))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("the modules differ, %d and %d bytes, first at %d", len(want), len(got), firstDifference(want, got))
			}
		})
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// giveTree gives every file of a tree, an overlay of the test's, to a user.
func giveTree(t *testing.T, tree string, uid int) {
	t.Helper()
	err := filepath.WalkDir(tree, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, uid, uid)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestAKilledBuildIsMadeAgain: kill -9 at any point leaves no half livepatch
// and no process; the next run removes what lies around and makes the same
// bytes as a build that nobody disturbed.
func TestAKilledBuildIsMadeAgain(t *testing.T) {
	k := kerneltest.Prepared(t)
	plan := planOfBoth(t, k)
	start := time.Now()
	want := must(t, plan, kerneltest.OtherCache(t, k, nil), t.TempDir(), k.Tools)
	whole := time.Since(start)
	cache := kerneltest.OtherCache(t, k, nil)
	w := childWork{Cache: cache, Data: filepath.Join(cache, "data"), Plan: plan, Tools: k.Tools}
	if err := os.Mkdir(w.Data, 0o755); err != nil {
		t.Fatal(err)
	}
	killed := 0
	for i := range 6 {
		cmd := child(t, w)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := time.Duration(rand.Int64N(int64(whole)))
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		if err := cmd.Wait(); err != nil {
			killed++
		}
		timer.Stop()
		done, err := build.Read(w.Data, k.Entry.Release)
		if err != nil {
			t.Fatalf("kill %d after %s: %v", i, after, err)
		}
		for _, r := range done {
			if r.Module.SHA256 != want.Module.SHA256 {
				t.Errorf("kill %d after %s left a livepatch of other bytes", i, after)
			}
		}
		nothingRuns(t, cache)
	}
	got := must(t, plan, cache, w.Data, k.Tools)
	if got.Module.SHA256 != want.Module.SHA256 {
		t.Errorf("after %d kills: %s, want %s", killed, got.Module.SHA256, want.Module.SHA256)
	}
	for _, pattern := range []string{filepath.Join(cache, "builds", "*"), filepath.Join(w.Data, "out", "*", ".building-*")} {
		if left, _ := filepath.Glob(pattern); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	if killed == 0 {
		t.Error("no build was killed")
	}
	t.Logf("%d of 6 builds killed", killed)
}

func nothingRuns(t *testing.T, mark string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		var running []string
		files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), mark) {
				running = append(running, f+" "+strings.ReplaceAll(string(b), "\x00", " "))
			}
		}
		if len(running) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("still running: %.500v", running)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestABuildWithoutRoomIsBroken: a full disk in each step ends as broken or as
// an error that says so, leaves no livepatch, and the next run with room makes
// the bytes that it should.
func TestABuildWithoutRoomIsBroken(t *testing.T) {
	k := kerneltest.Prepared(t)
	plan := planOfBoth(t, k)
	want := must(t, plan, kerneltest.OtherCache(t, k, nil), t.TempDir(), k.Tools)
	cache := kerneltest.OtherCache(t, k, nil)
	for _, c := range []struct{ what, size string }{
		{"builds", "16k"}, {"builds", "3m"}, {"objects", "100k"}, {"data", "12k"},
	} {
		dir := filepath.Join(cache, c.what)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size="+c.size); err != nil {
			t.Fatal(err)
		}
		res, err := build.Run(context.WithoutCancel(t.Context()), &objbuild.Driver{Cache: cache, Tools: k.Tools}, plan, filepath.Join(cache, "data"), build.NewClock(nil))
		said := fmt.Sprint(res.Error, err)
		if err == nil && res.Result != build.Broken || !strings.Contains(said, "no space left") && !strings.Contains(said, "No space left") && !strings.Contains(said, "MiB left") {
			t.Errorf("%s of %s: %s: %s", c.what, c.size, res.Result, said)
		}
		t.Logf("%s of %s: %.200s", c.what, c.size, said)
		if done, err := build.Read(filepath.Join(cache, "data"), k.Entry.Release); err != nil || len(done) != 0 {
			t.Errorf("%s of %s left %v, %v", c.what, c.size, done, err)
		}
		if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=1g"); err != nil {
			t.Fatal(err)
		}
		got := must(t, plan, cache, filepath.Join(cache, "data"), k.Tools)
		if got.Module.SHA256 != want.Module.SHA256 {
			t.Errorf("%s of %s, with room again: %s, want %s", c.what, c.size, got.Module.SHA256, want.Module.SHA256)
		}
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		_ = os.RemoveAll(filepath.Join(cache, "data"))
	}
}

// TestAHostileSourceIsBroken: what a fix makes the compiler do is bounded, and
// blamed on the build; the next build works.
func TestAHostileSourceIsBroken(t *testing.T) {
	k := kerneltest.Prepared(t)
	bomb := "\n#define K0 1,1,1,1\n"
	const names = "0123456789abcdefghijklmnop"
	for i := 1; i < len(names); i++ {
		bomb += strings.ReplaceAll("#define K"+names[i:i+1]+" X,X,X,X\n", "X", "K"+names[i-1:i])
	}
	bomb += "int klatch_bomb[] = { Kp };\n"
	cache := kerneltest.OtherCache(t, k, nil)
	good := edit(t, k, namespaceC, func(s string) string { return nopAtDefinition(t, s, "proc_timens_set_offset") })
	for _, c := range []struct {
		name, source, says string
		timeout            time.Duration
	}{
		{"macros that explode", bomb, "memory", 3 * time.Minute},
		{"a file without end", "\n#include \"/dev/zero\"\n", "", 3 * time.Minute},
		{"more time than there is", "\n/* nothing */\n", "longer than", 300 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := &objbuild.Driver{Cache: cache, Tools: k.Tools, Timeout: c.timeout, Limits: sandbox.Limits{Memory: 1500 << 20}}
			bad := edit(t, k, namespaceC, func(s string) string { return s + c.source })
			plan, err := compose.New(k.Entry, []queue.Patch{bad}, k.Tools.Version(), 1)
			if err != nil {
				t.Fatal(err)
			}
			data := t.TempDir()
			res, err := build.Run(context.WithoutCancel(t.Context()), d, plan, data, build.NewClock(nil))
			if err != nil {
				t.Fatal(err)
			}
			refusedByCompiler := res.Result == build.Refused && res.Refusals[0].Code == "does_not_compile" && c.says == ""
			if res.Result != build.Broken && !refusedByCompiler || !strings.Contains(res.Error, c.says) {
				t.Errorf("%s: %s %+v", res.Result, res.Error, res.Refusals)
			}
			t.Logf("%s: %s %+v", res.Result, res.Error, res.Refusals)
			if done, _ := build.Read(data, k.Entry.Release); len(done) != 0 {
				t.Error("something was built")
			}
			nothingRuns(t, cache+"/builds")
			if res, _ := run(t, k, cache, good); res.Result != build.Built {
				t.Errorf("the next build: %s %s", res.Result, res.Error)
			}
		})
	}
}
