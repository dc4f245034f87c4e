// SPDX-License-Identifier: Apache-2.0

package klp_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/machine/klp"
	"klatch/internal/machine/loaderapi"
)

// tree writes files of /proc and /sys below a folder.
func tree(t *testing.T, files map[string]string) *klp.Kernel {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return klp.At(root)
}

// machine is a kernel with three livepatches: one done, one that moves, one
// of a kernel without the attribute patched.
func machine() map[string]string {
	const lp = "sys/kernel/livepatch/"
	return map[string]string{
		"proc/sys/kernel/osrelease":         "6.1.0-56-cloud-amd64\n",
		"proc/sys/kernel/random/boot_id":    "11111111-2222-3333-4444-555555555555\n",
		"proc/cmdline":                      "BOOT_IMAGE=/vmlinuz root=/dev/vda1 klatch=off\n",
		"proc/modules":                      "af_packet 65536 2 - Live 0x0\nklatch_7 16384 1 - Live 0x0 (OEK)\n",
		"sys/kernel/notes":                  "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00" + strings.Repeat("\xab", 20),
		lp + "klatch_7/enabled":             "1\n",
		lp + "klatch_7/transition":          "0\n",
		lp + "klatch_7/vmlinux/patched":     "1\n",
		lp + "klatch_7/af_packet/patched":   "1\n",
		lp + "klatch_7/not_loaded/patched":  "0\n",
		lp + "klatch_7/replace":             "1\n",
		lp + "klatch_7/stack_order":         "1\n",
		lp + "klatch_8/enabled":             "1\n",
		lp + "klatch_8/transition":          "1\n",
		lp + "klatch_8/vmlinux/patched":     "1\n",
		lp + "klatch_8/af_packet/patched":   "0\n",
		lp + "kpatch_old/enabled":           "0\n",
		lp + "kpatch_old/transition":        "0\n",
		lp + "kpatch_old/vmlinux/f,0/x":     "",
		"proc/10/task/10/patch_state":       "0\n",
		"proc/10/task/10/stat":              "10 (a b) R 1) D 2 0 0 0 -1 2129984 0 0\n",
		"proc/10/task/10/stack":             "[<0>] msleep+0x2b/0x40\n[<0>] kthread+0xe0/0x110\n",
		"proc/20/task/21/patch_state":       "0\n",
		"proc/20/task/21/stat":              "21 (user) S 1 20 20 0 -1 4194304 0 0\n",
		"proc/20/task/22/patch_state":       "1\n",
		"proc/30/task/30/patch_state":       "-1\n",
		"proc/40/task/40/comm":              "just ended\n",
		"proc/self/task/50/patch_state":     "0\n",
		"proc/sys/kernel/random/uuid":       "x\n",
		"sys/kernel/livepatch_other/ignore": "",
	}
}

func TestLook(t *testing.T) {
	got, err := tree(t, machine()).Look()
	if err != nil {
		t.Fatal(err)
	}
	id, err := kernel.ParseBuildID(strings.Repeat("ab", 20))
	if err != nil {
		t.Fatal(err)
	}
	want := klp.State{
		Build:       kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-56-cloud-amd64", ID: id},
		BootID:      "11111111-2222-3333-4444-555555555555",
		CommandLine: []string{"BOOT_IMAGE=/vmlinuz", "root=/dev/vda1", "klatch=off"},
		Modules:     []string{"af_packet", "klatch_7"},
		Livepatches: []klp.Livepatch{
			{Name: "klatch_7", Enabled: true, Patched: true},
			{Name: "klatch_8", Enabled: true, Transition: true},
			{Name: "kpatch_old", Patched: true},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
}

func TestLookFails(t *testing.T) {
	for name, text := range map[string]string{
		"proc/sys/kernel/osrelease":                "../evil\n",
		"sys/kernel/notes":                         "",
		"sys/kernel/livepatch/klatch_7/enabled":    "2\n",
		"sys/kernel/livepatch/klatch_7/transition": "",
		"proc/cmdline":                             strings.Repeat("x", 2<<20),
	} {
		m := machine()
		m[name] = text
		if _, err := tree(t, m).Look(); err == nil {
			t.Errorf("%s with %.20q is taken", name, text)
		}
	}
	for _, name := range []string{"proc/sys/kernel/osrelease", "proc/sys/kernel/random/boot_id", "proc/cmdline", "sys/kernel/notes"} {
		m := machine()
		delete(m, name)
		if _, err := tree(t, m).Look(); err == nil {
			t.Errorf("without %s: no error", name)
		}
	}
}

func TestKernelWithoutLivepatch(t *testing.T) {
	m := machine()
	for name := range m {
		if strings.Contains(name, "livepatch/") || name == "proc/modules" {
			delete(m, name)
		}
	}
	k := tree(t, m)
	if s, err := k.Look(); err != nil || len(s.Livepatches) > 0 {
		t.Errorf("look: %+v, %v", s, err)
	}
	if b, err := k.Blockers(); err != nil || len(b) > 0 {
		t.Errorf("blockers: %+v, %v", b, err)
	}
	if err := k.Disable("klatch_1"); err != nil {
		t.Errorf("disable: %v", err)
	}
}

func TestBlockers(t *testing.T) {
	k := tree(t, machine())
	got, err := k.Blockers()
	if err != nil {
		t.Fatal(err)
	}
	want := []loaderapi.Blocker{
		{PID: 10, TID: 10, Stat: "10 (a b) R 1) D 2 0 0 0 -1 2129984 0 0", Stack: []string{"[<0>] msleep+0x2b/0x40", "[<0>] kthread+0xe0/0x110"}},
		{PID: 20, TID: 21, Stat: "21 (user) S 1 20 20 0 -1 4194304 0 0"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}

	m := machine() // the same transition, reversed
	m["sys/kernel/livepatch/klatch_8/enabled"] = "0\n"
	got, err = tree(t, m).Blockers()
	if err != nil || len(got) != 1 || got[0].TID != 22 {
		t.Errorf("reversed: %+v, %v", got, err)
	}

	for i := range 100 {
		m[fmt.Sprintf("proc/%d/task/%d/patch_state", 1000+i, 1000+i)] = "1\n"
	}
	if got, err = tree(t, m).Blockers(); err != nil || len(got) != 64 {
		t.Errorf("a hundred: %d, %v", len(got), err)
	}
}

func TestTracers(t *testing.T) {
	m := machine()
	const list, enabled = "sys/kernel/debug/kprobes/list", "sys/kernel/tracing/enabled_functions"
	m[list] = "ffffffffaedf1bb0  k  cmdline_proc_show+0x0    [FTRACE]\n"
	if _, err := tree(t, m).Tracers(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half of it: %v", err)
	}
	m[enabled] = "f (1) R I  \ttramp: 0xffffffffc03fc000 (kprobe_ftrace_handler+0x0/0x1b0) ->kprobe_ftrace_handler+0x0/0x1b0\n"
	got, err := tree(t, m).Tracers()
	const want = "-  k  cmdline_proc_show+0x0    [FTRACE]\n" +
		"f (1) R I  \ttramp: - (kprobe_ftrace_handler+0x0/0x1b0) ->kprobe_ftrace_handler+0x0/0x1b0\n"
	if err != nil || got != want {
		t.Errorf("got %q, %v", got, err)
	}
	m[enabled] = strings.Repeat("x", 2<<20)
	if _, err := tree(t, m).Tracers(); err == nil {
		t.Error("two MiB are taken")
	}
}

func TestDisable(t *testing.T) {
	m := machine()
	root := t.TempDir()
	for name, text := range m {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	k := klp.At(root)
	for name, want := range map[string]string{"klatch_7": "0\n", "kpatch_old": "0\n"} { // a file keeps its newline
		if err := k.Disable(name); err != nil {
			t.Error(err)
		}
		b, err := os.ReadFile(filepath.Join(root, "sys/kernel/livepatch", name, "enabled"))
		if err != nil || string(b) != want {
			t.Errorf("%s: enabled holds %q, %v", name, b, err)
		}
		if _, err := os.Stat(filepath.Join(root, "sys/kernel/livepatch", name, "force")); err == nil {
			t.Error("force was written")
		}
	}
}

func TestSeal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	content := strings.Repeat("module", 1000)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(17, io.SeekStart); err != nil {
		t.Fatal(err) // where a stranger left the offset does not matter
	}
	s, err := klp.Seal(f, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if string(s.Bytes) != content {
		t.Errorf("got %d bytes", len(s.Bytes))
	}
	for what, change := range map[string]func() error{
		"write":    func() error { _, err := s.File.WriteAt([]byte("x"), 0); return err },
		"truncate": func() error { return s.File.Truncate(1) },
		"grow":     func() error { return s.File.Truncate(1 << 20) },
		"unseal": func() error {
			_, err := unix.FcntlInt(s.File.Fd(), unix.F_ADD_SEALS, 0)
			return err
		},
		"write through another descriptor": func() error {
			again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", s.File.Fd()), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer again.Close()
			_, err = again.Write([]byte("x"))
			return err
		},
		"map writable": func() error {
			_, err := unix.Mmap(int(s.File.Fd()), 0, 10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		},
	} {
		if change() == nil {
			t.Errorf("%s works on a sealed file", what)
		}
	}
	if short, err := klp.Seal(f, 10); err != nil || len(short.Bytes) != 11 {
		t.Errorf("over the limit: %v", err)
	}
	if string(s.Bytes) != content {
		t.Error("the content changed")
	}
}

func TestLoadFault(t *testing.T) {
	if klp.LoadFault(nil) != nil {
		t.Error("success is a fault")
	}
	seen := []fault.Code{}
	for _, e := range []unix.Errno{unix.EKEYREJECTED, unix.EPERM, unix.ENOEXEC, unix.EEXIST, unix.EBUSY, unix.EINVAL, unix.ENOENT, unix.ENOMEM, unix.EIO} {
		err := klp.LoadFault(e)
		if !errors.Is(err, e) || fault.CodeOf(err) == "" || fault.HintOf(err) == "" || slices.Contains(seen, fault.CodeOf(err)) {
			t.Errorf("errno %d: %v", e, err)
		}
		seen = append(seen, fault.CodeOf(err))
	}
}
