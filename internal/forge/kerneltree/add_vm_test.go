// SPDX-License-Identifier: Apache-2.0

//go:build vm

package kerneltree_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/durable"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/testkit/kerneltest"
)

const addEnv = "KLATCH_TEST_ADD"

// TestAddInAChild is no test: it is the process that another one kills.
func TestAddInAChild(t *testing.T) {
	cache := os.Getenv(addEnv)
	if cache == "" {
		t.Skip("only as a child of another test")
	}
	if err := add(t, cache); err != nil {
		t.Fatal(err)
	}
}

func add(t *testing.T, cache string) error {
	k := kerneltest.Prepared(t)
	m := k.Maker
	m.Cache = cache
	_, err := m.Add(context.WithoutCancel(t.Context()), k.Entry.Release, "")
	return err
}

// TestKernelAddGoesOn: kernel add on a disk that is full at one step after
// the other, then killed at any point, then with room and in peace: what comes
// out is, byte for byte, what an undisturbed run made.
func TestKernelAddGoesOn(t *testing.T) {
	k := kerneltest.Prepared(t)
	cache, err := os.MkdirTemp("/var/tmp", "klatch-add-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(cache) })
	if err := syscall.Mount("tmpfs", cache, "tmpfs", 0, "mode=755,size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(cache, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	there := kerneltree.At(cache, k.Entry)
	for _, size := range []string{"1m", "400m", "2500m"} { // packages, source, debug information
		if err := syscall.Mount("", cache, "", syscall.MS_REMOUNT, "size="+size); err != nil {
			t.Fatal(err)
		}
		err := add(t, cache)
		if err == nil {
			t.Errorf("a disk of %s was enough", size)
		} else if s := strings.ToLower(err.Error()); !strings.Contains(s, "no space left") && !strings.Contains(s, "mib left") {
			t.Errorf("a disk of %s: %v", size, err)
		}
		t.Logf("disk of %s: %.300v", size, err)
		if there.Ready() {
			t.Fatalf("a disk of %s: the tree says that it is ready", size)
		}
	}
	if err := syscall.Mount("", cache, "", syscall.MS_REMOUNT, "size=8g"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestAddInAChild$")
		cmd.Env = append(os.Environ(), addEnv+"="+cache)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := time.Second + time.Duration(rand.Int64N(int64(30*time.Second)))
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		err := cmd.Wait()
		timer.Stop()
		t.Logf("killed after %s: %v", after.Round(time.Second), err)
		if err != nil && there.Ready() {
			t.Error("a killed run left a tree that says that it is ready")
		}
	}
	if err := add(t, cache); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"vmlinux", "vmlinux.symtab", "vmlinuz", "config", "units.json", "sizes.json", "tree/.config", "tree/Module.symvers",
		"tree/include/generated/autoconf.h", "tree/include/generated/asm-offsets.h", "tree/net/unix/af_unix.c", "modules/dummy.ko", "modules/dummy.symtab"} {
		want, err1 := digest(filepath.Join(k.Tree.Dir, f))
		got, err2 := digest(filepath.Join(there.Dir, f))
		if err := errors.Join(err1, err2); err != nil || want != got {
			t.Errorf("%s differs from that of another run: %v", f, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(there.Dir, "unpacked")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func digest(file string) (string, error) {
	b, err := durable.ReadFile(file, 1<<30)
	return fmt.Sprintf("%x", sha256.Sum256(b)), err
}
