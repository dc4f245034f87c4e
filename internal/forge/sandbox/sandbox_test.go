// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Child()
	os.Exit(m.Run())
}

// tempDir is outside the private folders of t.TempDir, which the build user
// may not enter.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "klatch-sandbox-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func command(t *testing.T, script string) Command {
	t.Helper()
	dir := tempDir(t)
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "f"), []byte("old\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{tree, filepath.Join(tree, "f")} {
		if err := Own(p); err != nil {
			t.Fatal(err)
		}
	}
	return Command{Tree: tree, Scratch: filepath.Join(dir, "scratch"), Dir: tree,
		Argv: []string{"sh", "-c", script}, Env: BaseEnv()}
}

func TestTreeStaysUntouched(t *testing.T) {
	c := command(t, "echo new > f && echo more > g && rm -f f && echo again > f")
	res, err := Run(t.Context(), c)
	if err != nil || res.Exit != 0 {
		t.Fatalf("exit %d, %v: %s", res.Exit, err, res.Output)
	}
	if b, _ := os.ReadFile(filepath.Join(c.Tree, "f")); string(b) != "old\n" {
		t.Errorf("the tree's file became %q", b)
	}
	if b, _ := os.ReadFile(c.Upper("f")); string(b) != "again\n" {
		t.Errorf("the scratch folder's file is %q", b)
	}
	c.Argv = []string{"cat", "f", "g"}
	if res, err = Run(t.Context(), c); err != nil || string(res.Output) != "again\nmore\n" {
		t.Errorf("a later command sees %q, %v", res.Output, err)
	}
}

func TestNoNetworkNoRootNoStrangers(t *testing.T) {
	res, err := Run(t.Context(), command(t, `
		echo "interfaces: $(ls /sys/class/net 2>/dev/null | wc -l) $(grep -c : /proc/net/dev)"
		echo "processes: $(ls -d /proc/[0-9]* | wc -l)"
		echo "uid: $(id -u)"
		echo "caps: $(grep CapEff /proc/self/status | cut -f2)"
		env | cut -d= -f1 | sort | tr '\n' ' '`))
	if err != nil {
		t.Fatal(err)
	}
	out := string(res.Output)
	if !strings.Contains(out, " 1\n") { // only lo in /proc/net/dev
		t.Errorf("a network besides loopback: %s", out)
	}
	if os.Getuid() == 0 && (!strings.Contains(out, "uid: 62100") || !strings.Contains(out, "caps: 0000000000000000")) {
		t.Errorf("rights left: %s", out)
	}
	for _, secret := range []string{"SSH_", "SUDO_", "GOPATH", "LOGNAME"} {
		if strings.Contains(out, secret) {
			t.Errorf("the caller's environment leaks: %s", out)
		}
	}
}

func TestEndOfTimeEndsAllProcesses(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := Run(ctx, command(t, "sleep 60 & sleep 60"))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("took %s: a process outlived its time", took)
	}
}

func TestExitStatusIsTheProgramsOwn(t *testing.T) {
	res, err := Run(t.Context(), command(t, "echo why >&2; exit 7"))
	if err != nil || res.Exit != 7 || string(res.Output) != "why\n" {
		t.Errorf("exit %d, output %q, %v", res.Exit, res.Output, err)
	}
}
