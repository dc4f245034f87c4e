// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"klatch/internal/machine/agent"
	"klatch/internal/machine/local"
	"klatch/internal/testkit"
	"klatch/internal/wire"
)

// TestKilledAtEveryStep kills a real klatchd with SIGKILL at each call that
// changes something: what is made durable, what is renamed, what is said to
// the loader. After a restart the journey must end as if nothing had happened.
func TestKilledAtEveryStep(t *testing.T) {
	testkit.Need(t, "strace")
	for _, call := range []string{"fsync", "renameat", "sendmsg", "unlinkat"} {
		var last atomic.Int64
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			for n := 1; n <= 80; n++ {
				t.Run(fmt.Sprint(n), func(t *testing.T) {
					if killedAt(t, call, n) {
						last.Store(int64(n))
					}
				})
				if int64(n) > last.Load() {
					return // the journey has no more of these calls
				}
			}
			t.Errorf("no end of %s calls", call)
		})
	}
}

func TestAProcessGoesTheWholeJourney(t *testing.T) {
	r := newRig(t)
	r.start()
	r.until("not enrolled", func(s agent.Status) bool { return s.State.State == "not_enrolled" })
	if os.Geteuid() != 0 {
		r.enroll()
		r.kill()
		r.start()
	} else if _, err := local.Dial(r.socket).Enroll(t.Context(), local.EnrollRequest{Server: r.fleet.URL, Token: r.fleet.Token}); err != nil {
		t.Fatal(err)
	}
	r.until("without a livepatch", func(s agent.Status) bool { return s.Check.Result == "current" })
	r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
	r.until("confirmed", confirmed)
	r.fleet.Publish(r.machine.Kernel, 2, "CVE-2026-0001", "CVE-2026-0002")
	s := r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })
	if len(s.State.Fixes) != 2 {
		t.Errorf("fixes %v", s.State.Fixes)
	}
	r.secretsStayHidden()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// secretsStayHidden looks at who may read the credential.
func (r *rig) secretsStayHidden() {
	r.t.Helper()
	err := filepath.WalkDir(r.state, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			r.t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		r.t.Error(err)
	}
	b, err := os.ReadFile(filepath.Join(r.state, "journal.json"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, secret := range []string{string(r.fleet.Token), "PRIVATE"} {
		if strings.Contains(string(b), secret) {
			r.t.Error("the journal holds a secret")
		}
	}
}

// checkEnd says that a journey ended as if nothing had happened.
func (r *rig) checkEnd(s agent.Status) {
	r.t.Helper()
	if s.State.Sequence != 1 || s.State.Highest != 1 {
		r.t.Errorf("state %+v", s.State)
	}
	if n := r.machine.Loads(); n != 1 {
		r.t.Errorf("the kernel took %d livepatches", n)
	}
	want := []wire.Event{wire.EventBooted, wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed}
	if got := r.fleet.Events(); !slices.Equal(got, want) {
		r.t.Errorf("events\n got %v\nwant %v", got, want)
	}
	// The metadata's folder is cleared by the next look at the server.
	// The daemon goes on, so a file that it is writing now is there for a moment.
	for _, pattern := range []string{".tmp-*", "staged/.tmp-*"} {
		left, err := filepath.Glob(filepath.Join(r.state, pattern))
		for end := time.Now().Add(10 * time.Second); err == nil && len(left) > 0 && time.Now().Before(end); {
			<-time.After(20 * time.Millisecond)
			left = slices.DeleteFunc(left, func(name string) bool { _, err := os.Lstat(name); return errors.Is(err, fs.ErrNotExist) })
		}
		if err != nil || len(left) > 0 {
			r.t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

func killed(err error) bool {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signal() == syscall.SIGKILL
}

// killedAt runs a journey that strace kills at the n-th call of a kind, starts
// klatchd again, and wants the end of an undisturbed journey. It is false
// where the journey has fewer such calls.
func killedAt(t *testing.T, call string, n int) bool {
	r := newRig(t)
	r.enroll()
	r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
	r.start("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call, "-e", "inject="+call+":signal=SIGKILL:when="+strconv.Itoa(n))
	dead := make(chan error, 1)
	go func() { dead <- r.cmd.Wait() }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		select {
		case err := <-dead:
			if !killed(err) {
				t.Fatalf("klatchd ended by itself: %v", err)
			}
			r.start()
			r.checkEnd(r.until("confirmed after a kill", confirmed))
			return true
		case <-time.After(50 * time.Millisecond):
		}
		if s, err := local.Dial(r.socket).Status(ctx); err == nil && confirmed(s) {
			_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
			if err := <-dead; !killed(err) {
				t.Errorf("klatchd ended by itself: %v", err)
			}
			r.checkEnd(s)
			return false
		}
		if ctx.Err() != nil {
			t.Fatal("neither killed nor confirmed")
		}
	}
}

// TestAttackDiskFull: the disk is full at one write after the other: what is
// made durable fails once, at the n-th time. klatchd may end, and systemd starts
// it again; it may never tell of something that is not on disk, nor load twice.
func TestAttackDiskFull(t *testing.T) {
	testkit.Need(t, "strace")
	const most = 30
	var hit atomic.Int64
	t.Run("each", func(t *testing.T) {
		for n := 1; n <= most; n++ {
			t.Run(fmt.Sprintf("Attack/L/disk full at write %d", n), func(t *testing.T) {
				t.Parallel()
				if fullAt(t, n) {
					hit.Add(1)
				}
			})
		}
	})
	if n := hit.Load(); n < 12 || n == most {
		t.Errorf("%d writes failed; a journey has more than 12, and fewer than %d", n, most)
	}
}

// fullAt is false where the journey has fewer writes.
func fullAt(t *testing.T, n int) bool {
	r := newRig(t)
	r.enroll()
	r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
	log := filepath.Join(t.TempDir(), "strace")
	r.start("strace", "-f", "-qq", "-o", log, "-e", "trace=fsync", "-e", "inject=fsync:error=ENOSPC:when="+strconv.Itoa(n))
	ended := make(chan error, 1)
	go func() { ended <- r.cmd.Wait() }()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	for {
		select {
		case err := <-ended:
			if err == nil {
				t.Fatal("klatchd ended as if all were well")
			}
			r.start()
			r.checkEnd(r.until("confirmed after a full disk", confirmed))
			return true
		case <-time.After(50 * time.Millisecond):
		}
		if s, err := local.Dial(r.socket).Status(ctx); err == nil && confirmed(s) {
			_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
			<-ended
			r.checkEnd(s)
			b, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			return strings.Contains(string(b), "ENOSPC")
		}
		if ctx.Err() != nil {
			t.Fatal("neither ended nor confirmed")
		}
	}
}
