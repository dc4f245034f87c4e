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

	"golang.org/x/sys/unix"

	"klatch/internal/testkit"
)

func TestMain(m *testing.M) {
	Child()
	if script := os.Getenv(callerEnv); script != "" { // TestKilledCallerLeavesNothing
		_, _ = Run(context.Background(), Command{Dir: "/", Argv: []string{"sh", "-c", script}})
		os.Exit(0)
	}
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

// forms runs a test with the host's root and with a root folder: each
// guarantee holds in both.
func forms(t *testing.T, test func(t *testing.T, form func(Command) Command)) {
	t.Run("host", func(t *testing.T) { test(t, func(c Command) Command { return c }) })
	t.Run("root folder", func(t *testing.T) {
		root := rootFolder(t)
		test(t, func(c Command) Command {
			c.Root = root
			return c
		})
	})
}

// rootFolder is one with the host's programs, and a file that the host does
// not have.
func rootFolder(t *testing.T) string {
	t.Helper()
	testkit.Need(t, "root", "merged-usr") // a mount makes the host's programs a root folder
	dir := tempDir(t)
	if err := os.MkdirAll(filepath.Join(dir, "usr"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"bin", "sbin", "lib", "lib64"} {
		to, err := os.Readlink("/" + n)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(dir, n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "etc/only-here"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/usr", filepath.Join(dir, "usr"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Join(dir, "usr"), unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	})
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

func TestTreeStaysUntouched(t *testing.T) { forms(t, testTreeStaysUntouched) }

func testTreeStaysUntouched(t *testing.T, form func(Command) Command) {
	c := form(command(t, "echo new > f && echo more > g && rm -f f && echo again > f"))
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

func TestNoNetworkNoRootNoStrangers(t *testing.T) { forms(t, testNoNetworkNoRootNoStrangers) }

func testNoNetworkNoRootNoStrangers(t *testing.T, form func(Command) Command) {
	res, err := Run(t.Context(), form(command(t, `
		echo "interfaces: $(ls /sys/class/net 2>/dev/null | wc -l) $(grep -c : /proc/net/dev)"
		echo "processes: $(ls -d /proc/[0-9]* | wc -l)"
		echo "uid: $(id -u)"
		echo "caps: $(grep CapEff /proc/self/status | cut -f2)"
		env | cut -d= -f1 | sort | tr '\n' ' '`)))
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

func TestEndOfTimeEndsAllProcesses(t *testing.T) { forms(t, testEndOfTimeEndsAllProcesses) }

func testEndOfTimeEndsAllProcesses(t *testing.T, form func(Command) Command) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := Run(ctx, form(command(t, "sleep 60 & sleep 60")))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("took %s: a process outlived its time", took)
	}
}

func TestExitStatusIsTheProgramsOwn(t *testing.T) { forms(t, testExitStatusIsTheProgramsOwn) }

func testExitStatusIsTheProgramsOwn(t *testing.T, form func(Command) Command) {
	res, err := Run(t.Context(), form(command(t, "echo why >&2; exit 7")))
	if err != nil || res.Exit != 7 || string(res.Output) != "why\n" {
		t.Errorf("exit %d, output %q, %v", res.Exit, res.Output, err)
	}
}

// What the build user owns outside of the tree belongs to other builds: their
// trees, their scratch folders, the unpacked tools.
func TestOtherBuildsStayUntouched(t *testing.T) { forms(t, testOtherBuildsStayUntouched) }

func testOtherBuildsStayUntouched(t *testing.T, form func(Command) Command) {
	c := form(command(t, ""))
	other := filepath.Join(filepath.Dir(c.Tree), "other")
	mine := filepath.Join(filepath.Dir(c.Tree), "mine")
	for _, d := range []string{other, mine} {
		if err := errors.Join(os.Mkdir(d, 0o755), Own(d)); err != nil {
			t.Fatal(err)
		}
	}
	c.Writable = []string{mine}
	c.Visible = []string{filepath.Dir(c.Tree)} // seen, and still not to be written
	c.Argv = []string{"sh", "-c", "echo x > " + other + "/x; echo x > " + c.Scratch + "/upper/x; echo x > /var/tmp/klatch-x; " +
		"echo x > " + mine + "/x && echo x > $TMPDIR/x && echo x > tree && echo x > /dev/null && echo done"}
	res, err := Run(t.Context(), c)
	if err != nil || !strings.HasSuffix(string(res.Output), "done\n") {
		t.Errorf("cannot write where it must: exit %d, %v: %s", res.Exit, err, res.Output)
	}
	if _, err := os.Lstat(c.Upper("tree")); err != nil {
		t.Errorf("the scratch folder has nothing: %v", err)
	}
	for _, f := range []string{other + "/x", c.Scratch + "/upper/x", "/var/tmp/klatch-x"} {
		if _, err := os.Lstat(f); err == nil {
			t.Errorf("a build wrote %s", f)
			os.Remove(f)
		}
	}
	if _, err := os.Lstat(mine + "/x"); err != nil {
		t.Errorf("the folder named as writable has nothing: %v", err)
	}
}

func TestNoWayToMoreRights(t *testing.T) { forms(t, testNoWayToMoreRights) }

func testNoWayToMoreRights(t *testing.T, form func(Command) Command) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFD, 0); err != nil { // as a descriptor that the caller's shell left open
		t.Fatal(err)
	}
	c := form(command(t, `
		grep -E '^(NoNewPrivs|CapBnd):' /proc/self/status
		echo "run: $(ls -A /run | wc -l)"
		echo "umount: $(umount "$PWD" 2>/dev/null && echo worked)"
		ls /proc/self/fd | tr '\n' ' '`))
	c.Env = nil
	t.Setenv("KLATCH_SECRET", "x")
	c.Argv[2] += "; env"
	res, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	out := string(res.Output)
	for _, want := range []string{"NoNewPrivs:\t1\n", "CapBnd:\t0000000000000000\n", "run: 0\n", "umount: \n", "0 1 2 3 "} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}
	if strings.Contains(out, "KLATCH_SECRET") {
		t.Errorf("the caller's environment leaks:\n%s", out)
	}
}

// A program in a root folder sees that folder's files and what it was given of
// the host's, nothing else; it can write in none of them but those named.
func TestRootFolderIsAllThereIs(t *testing.T) {
	c := command(t, "")
	c.Root = rootFolder(t)
	seen, secret := filepath.Join(filepath.Dir(c.Tree), "seen"), filepath.Join(filepath.Dir(c.Tree), "secret")
	for _, d := range []string{seen, secret} {
		if err := errors.Join(os.Mkdir(d, 0o755), os.WriteFile(filepath.Join(d, "f"), []byte("x"), 0o666), os.Chmod(filepath.Join(d, "f"), 0o666), Own(d)); err != nil {
			t.Fatal(err)
		}
	}
	c.Visible = []string{seen}
	c.Argv = []string{"sh", "-c", "ls -A / | tr '\\n' ' '; ls -A /dev | tr '\\n' ' '; ls /etc; cat " + seen + "/f; ls " + secret + " 2>&1; " +
		"echo y > " + seen + "/f; echo y > /etc/only-here; echo y > /usr/y; mkdir /var/y; echo y > /y; echo y > /tmp/y && cat $TMPDIR/y; wc -l < /proc/self/mountinfo"}
	res, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	out := string(res.Output)
	for _, want := range []string{"bin dev etc lib lib64 proc run sbin tmp usr var ", "fd full null random stderr stdin stdout urandom zero ",
		"only-here\n", "xls: cannot access", "\ny\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}
	if n := strings.Count(out, "Read-only file system"); n != 5 {
		t.Errorf("%d of 5 writes refused:\n%s", n, out)
	}
	if b, _ := os.ReadFile(filepath.Join(seen, "f")); string(b) != "x" {
		t.Errorf("a visible file became %q", b)
	}
}

func TestRootFolderThatCannotBe(t *testing.T) {
	root := rootFolder(t)
	for name, change := range map[string]func(*Command){
		"no such folder":              func(c *Command) { c.Root = "/nonexistent" },
		"a host folder over a part":   func(c *Command) { c.Visible = []string{"/usr/share"} },
		"a host folder under private": func(c *Command) { c.Visible = []string{"/run/lock"} },
	} {
		t.Run(name, func(t *testing.T) {
			c := command(t, "true")
			c.Root = root
			change(&c)
			if res, err := Run(t.Context(), c); err == nil {
				t.Errorf("ran: exit %d, %s", res.Exit, res.Output)
			}
		})
	}
}
