// SPDX-License-Identifier: Apache-2.0

package facts

import (
	"encoding/hex"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/wire"
)

const buildID = "cafe0123456789abcdef0123456789abcdef0123"

// notes is /sys/kernel/notes with one GNU build id.
func notes() string {
	id, err := hex.DecodeString(buildID)
	if err != nil {
		panic(err)
	}
	return "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00" + string(id)
}

func debian() map[string]string {
	return map[string]string{
		"proc/sys/kernel/osrelease":                "6.1.0-50-cloud-amd64\n",
		"proc/sys/kernel/hostname":                 "db1\n",
		"proc/sys/kernel/random/boot_id":           "11111111-2222-3333-4444-555555555555\n",
		"proc/sys/kernel/tainted":                  "0\n",
		"sys/kernel/notes":                         notes(),
		"sys/kernel/warn_count":                    "0\n",
		"sys/kernel/oops_count":                    "0\n",
		"sys/kernel/security/lockdown":             "none [integrity] confidentiality\n",
		"sys/module/module/parameters/sig_enforce": "Y\n",
		"etc/os-release":                           "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n",
		"boot/vmlinuz-6.1.0-50-cloud-amd64":        "",
	}
}

func tree(t *testing.T, files map[string]string) Machine {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		write(t, root, name, content)
	}
	return Machine{Root: root}
}

func write(t *testing.T, root, name, content string) {
	t.Helper()
	p := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// with changes a tree; an empty value removes the file.
func with(base map[string]string, changes map[string]string) map[string]string {
	out := maps.Clone(base)
	for k, v := range changes {
		if v == "" {
			delete(out, k)
		} else {
			out[k] = v
		}
	}
	return out
}

func TestFacts(t *testing.T) {
	full := func() wire.Facts {
		id, err := kernel.ParseBuildID(buildID)
		if err != nil {
			t.Fatal(err)
		}
		return wire.Facts{
			Hostname: "db1",
			Kernel:   kernel.Build{Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-cloud-amd64", ID: id},
			BootID:   "11111111-2222-3333-4444-555555555555",
			Lockdown: "integrity", Enforced: "yes", Version: "1",
		}
	}
	for _, tt := range []struct {
		name    string
		changes map[string]string
		want    func(*wire.Facts)
		code    fault.Code
	}{
		{"a Debian machine", nil, func(*wire.Facts) {}, ""},
		{"a newer kernel waits for a reboot", map[string]string{"boot/vmlinuz-6.1.0-56-cloud-amd64": "x"},
			func(f *wire.Facts) { f.Newer = "6.1.0-56-cloud-amd64" }, ""},
		{"no lockdown file where lockdown is not built in is none",
			map[string]string{"sys/kernel/security/lockdown": "", "sys/kernel/security/lsm": "capability,yama,apparmor"},
			func(f *wire.Facts) { f.Lockdown = "none" }, ""},
		{"no security file system at all is unknown, not none", map[string]string{"sys/kernel/security/lockdown": ""},
			func(f *wire.Facts) { f.Lockdown = "unknown" }, ""},
		{"no word on module signatures is unknown, not no", map[string]string{"sys/module/module/parameters/sig_enforce": ""},
			func(f *wire.Facts) { f.Enforced = "unknown" }, ""},
		{"os-release in its other place", map[string]string{"etc/os-release": "", "usr/lib/os-release": "ID='debian'\nVERSION_ID=12"},
			func(*wire.Facts) {}, ""},
		{"without notes the kernel is unknown", map[string]string{"sys/kernel/notes": ""}, nil, "build_unknown"},
		{"with damaged notes the kernel is unknown", map[string]string{"sys/kernel/notes": notes()[:20]}, nil, "build_unknown"},
		{"without a release the kernel is unknown", map[string]string{"proc/sys/kernel/osrelease": ""}, nil, "build_unknown"},
		{"without a boot id nothing can be journaled", map[string]string{"proc/sys/kernel/random/boot_id": ""}, nil, "boot_id_unknown"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tree(t, with(debian(), tt.changes)).Facts("1")
			if tt.want == nil {
				if err == nil || fault.CodeOf(err) != "build_unknown" && fault.CodeOf(err) != tt.code || fault.HintOf(err) == "" && tt.code == "build_unknown" {
					t.Fatalf("err = %v, want code %s", err, tt.code)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := full()
			tt.want(&want)
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("facts (-want +got):\n%s", d)
			}
		})
	}
}

func TestKernels(t *testing.T) {
	for _, tt := range []struct {
		name, installed string
		running, newer  kernel.Release
		unknown         bool
	}{
		{"only the running one", "6.1.0-50-amd64", "6.1.0-50-amd64", "", false},
		{"a number is compared as a number", "6.1.0-9-amd64 6.1.0-10-amd64", "6.1.0-9-amd64", "6.1.0-10-amd64", false},
		{"an older one is not newer", "6.1.0-49-amd64 6.1.0-50-amd64", "6.1.0-50-amd64", "", false},
		{"a backported series is newer", "6.1.0-56-amd64 6.12.9+bpo-amd64", "6.1.0-56-amd64", "6.12.9+bpo-amd64", false},
		{"a release candidate comes before its release", "7.0.0-rc3-amd64 7.0.0-amd64", "7.0.0-rc3-amd64", "7.0.0-amd64", false},
		{"a release is not followed by its candidate", "7.0.0-rc3-amd64 7.0.0-amd64", "7.0.0-amd64", "", false},
		{"left-overs are no kernels", "6.1.0-50-amd64 6.1.0-99-amd64.old 6.1.0-98-amd64.dpkg-new", "6.1.0-50-amd64", "", false},
		{"nothing found is unknown", "", "6.1.0-50-amd64", "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := tree(t, map[string]string{"boot/config": ""})
			for f := range strings.FieldsSeq(tt.installed) {
				write(t, m.Root, "boot/vmlinuz-"+f, "")
			}
			ks, err := m.Kernels()
			if (err != nil) != tt.unknown {
				t.Fatalf("err = %v", err)
			}
			if got := ks.Newer(tt.running); got != tt.newer {
				t.Errorf("newer = %q, want %q", got, tt.newer)
			}
		})
	}
	if _, err := (Machine{Root: t.TempDir()}).Kernels(); fault.CodeOf(err) != "kernels_unknown" {
		t.Errorf("without /boot: %v", err)
	}
}

func TestLivepatches(t *testing.T) {
	m := tree(t, debian())
	if lps, err := m.Livepatches(); err != nil || len(lps) != 0 {
		t.Fatalf("a kernel without the folder: %v, %v", lps, err)
	}
	dir := "sys/kernel/livepatch/klatch_3/"
	for name, content := range map[string]string{
		"enabled": "1\n", "transition": "1\n", "vmlinux/patched": "1\n", "vmlinux/unix_ioctl,1/x": "", "nf_tables/patched": "0\n",
	} {
		write(t, m.Root, dir+name, content)
	}
	lp, ok, err := m.Livepatch(3)
	if want := (Livepatch{"klatch_3", true, true, true}); err != nil || !ok || lp != want {
		t.Errorf("with a module that is not loaded: %+v, %v, %v", lp, ok, err)
	}
	write(t, m.Root, "sys/module/nf_tables/initstate", "live\n")
	if lp, _, _ = m.Livepatch(3); lp.Patched {
		t.Errorf("an unpatched object of a loaded module: %+v", lp)
	}
	if _, ok, err := m.Livepatch(4); ok || err != nil {
		t.Errorf("another sequence: %v, %v", ok, err)
	}
	write(t, m.Root, dir+"enabled", "yes\n")
	if _, _, err := m.Livepatch(3); err == nil {
		t.Error("a strange value was taken for a flag")
	}
	if _, _, err := (Machine{Root: t.TempDir()}).Livepatch(3); err == nil {
		t.Error("without /sys: could not find out is an error")
	}
}

func TestTrouble(t *testing.T) {
	log := "6,10,1,-;Linux version 6.1\n SUBSYSTEM=x\n"
	const bad = "4,11,2,-;WARNING: CPU: 0 PID: 1 at net/core/dev.c:1\n4,12,3,-;Call Trace:\n"
	for _, tt := range []struct {
		name          string
		before, after map[string]string
		want          Verdict
		text          string
	}{
		{"nothing new", nil, nil, Quiet, ""},
		{"a warning was counted", nil, map[string]string{"sys/kernel/warn_count": "1\n"}, Trouble, "kernel warning"},
		{"an oops was counted", nil, map[string]string{"sys/kernel/oops_count": "2\n"}, Trouble, "kernel oops"},
		{"the log names it", map[string]string{"dev/kmsg": log},
			map[string]string{"sys/kernel/warn_count": "1\n", "dev/kmsg": log + bad}, Trouble, "kernel warning: WARNING: CPU: 0 PID: 1 at net/core/dev.c:1"},
		{"what was there before does not count", map[string]string{"dev/kmsg": log + bad, "sys/kernel/warn_count": "1\n", "proc/sys/kernel/tainted": "512\n"},
			nil, Quiet, ""},
		{"what a program writes into the log does not count", map[string]string{"dev/kmsg": log},
			map[string]string{"dev/kmsg": log + "12,11,2,-;WARNING: a lie\n"}, Quiet, ""},
		{"an old kernel without counters has the taint", map[string]string{"sys/kernel/warn_count": "", "sys/kernel/oops_count": ""},
			map[string]string{"proc/sys/kernel/tainted": "512\n"}, Trouble, "kernel taint bits 0x200"},
		{"an old kernel that stays clean", map[string]string{"sys/kernel/warn_count": "", "sys/kernel/oops_count": ""}, nil, Quiet, ""},
		{"loading a livepatch taints and is no trouble", nil, map[string]string{"proc/sys/kernel/tainted": "45056\n"}, Quiet, ""},
		{"an old kernel that had warned cannot be known", map[string]string{"sys/kernel/warn_count": "", "sys/kernel/oops_count": "", "proc/sys/kernel/tainted": "512\n"},
			nil, Unclear, "this kernel has no warning counter"},
		{"another boot cannot be compared", nil, map[string]string{"proc/sys/kernel/random/boot_id": "other\n"}, Unclear, "another boot"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := tree(t, with(debian(), tt.before))
			marks := m.Marks()
			for k, v := range tt.after {
				write(t, m.Root, k, v)
			}
			got, text := m.Since(marks)
			if got != tt.want || !strings.HasPrefix(text, tt.text) && !strings.HasSuffix(text, tt.text) {
				t.Errorf("Since = %s %q, want %s %q", got, text, tt.want, tt.text)
			}
		})
	}
}

func TestFactsOfThisMachine(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/notes"); err != nil {
		t.Skip("needs /sys")
	}
	b, err := Machine{Root: "/"}.Build()
	if err != nil {
		t.Fatal(err)
	}
	if mk := (Machine{Root: "/"}).Marks(); mk.BootID == "" || mk.Taint == nil {
		t.Errorf("marks of %s: %+v", b, mk)
	}
}
