// SPDX-License-Identifier: Apache-2.0

// Package testkit holds what tests of several packages share. It is imported
// by tests only.
//
// Start with Need: it is how a test says what the machine must offer.
package testkit

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// RequireEnv names the environment variable that turns skips into failures:
// a list of capabilities, separated by commas, that this machine promises.
const RequireEnv = "KLATCH_REQUIRE"

// KernelEnv names the environment variable with the path of the stock kernel
// image (bzImage) that VM tests boot.
const KernelEnv = "KLATCH_LAB_KERNEL"

// KernelDebEnv names the environment variable with the path of the package
// of a stock kernel, for tests that make a full guest.
const KernelDebEnv = "KLATCH_LAB_KERNEL_DEB"

// OwnKernelEnv names the environment variable that, set to anything, allows
// tests to build a whole kernel. It takes a quarter of an hour on two cores.
const OwnKernelEnv = "KLATCH_OWN_KERNEL"

// LongEnv names the environment variable that, set to anything, makes tests
// try the whole of a table of which CI tries a part.
const LongEnv = "KLATCH_LONG"

// Need skips the test when the machine lacks one of the capabilities, and
// fails it when RequireEnv promises that capability. An unknown capability
// is a mistake in the test and fails it everywhere.
func Need(t testing.TB, capabilities ...string) {
	t.Helper()
	promised := strings.Split(os.Getenv(RequireEnv), ",")
	for _, c := range capabilities {
		has, known := probes[c]
		switch {
		case !known:
			t.Fatalf("need %q: no such capability", c)
		case has():
		case slices.Contains(promised, c):
			t.Fatalf("need %s: %s promises it, and this machine does not have it", c, RequireEnv)
		default:
			t.Skipf("need %s", c)
		}
	}
}

// probes says for each capability how to find out.
var probes = map[string]func() bool{
	"qemu":        allInPath("qemu-system-x86_64", "qemu-img", "busybox"),
	"kernel":      func() bool { return Kernel() != "" },
	"root":        func() bool { return os.Geteuid() == 0 },
	"kerneldeb":   func() bool { return KernelDeb() != "" },
	"strace":      allInPath("strace"),
	"openssl":     allInPath("openssl"),
	"sign-file":   func() bool { return SignFile() != "" },
	"chromium":    allInPath("chromium"),
	"debootstrap": allInPath("debootstrap", "mke2fs"),
	"apt":         allInPath("apt-get", "dpkg-deb"),
	"merged-usr":  func() bool { _, err := os.Readlink("/lib64"); return err == nil },
	"long":        func() bool { return os.Getenv(LongEnv) != "" },
	"gcc":         allInPath("gcc", "ld"),
	"shared":      func() bool { return sharedDir() != "" },
	"gpg":         allInPath("gpg", "gpgconf"),
	"softhsm":     func() bool { return SoftHSM() != "" && allInPath("softhsm2-util", "gcc")() },
	"gcc-11":      allInPath("gcc-11"),
	"clang":       allInPath("clang-14"),
	"python3":     allInPath("python3"),
	"ovmf": func() bool {
		return allInPath("mformat", "mcopy")() && isFile("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd") &&
			isFile("/usr/lib/shim/shimx64.efi.signed") && isFile("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed")
	},
	"dropbear": allInPath("dropbear", "dbclient", "dropbearkey", "ldd"),
	"virtio": func() bool {
		return Kernel() != "" && isFile(filepath.Join(filepath.Dir(Kernel()), "modules", "virtio_net.ko"))
	},
	"ownkernel": func() bool {
		return os.Getenv(OwnKernelEnv) != "" && allInPath("ccache", "recountdiff", "gawk", "gcc-12")()
	},
}

// SignFile is the kernel's own program that signs modules: the one that
// KLATCH_SIGN_FILE names, or that of Debian's package linux-kbuild. It is
// empty when there is none.
func SignFile() string {
	names := []string{os.Getenv("KLATCH_SIGN_FILE")}
	found, _ := filepath.Glob("/usr/lib/linux-kbuild-*/scripts/sign-file") // the pattern is well-formed
	for _, n := range append(names, found...) {
		if st, err := os.Stat(n); err == nil && st.Mode().IsRegular() {
			return n
		}
	}
	return ""
}

// SoftHSM is the library of Debian's softhsm2, a PKCS#11 token in software. It
// is empty when there is none.
func SoftHSM() string {
	found, _ := filepath.Glob("/usr/lib/softhsm/libsofthsm2.so") // the pattern is well-formed
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

// Kernel is the kernel image for VM tests: the one that KernelEnv names, or
// the last of Debian 12's by name that klatch-forge or a test has prepared in
// the cache. It is empty when there is none.
func Kernel() string {
	return named(KernelEnv, "kernels", "6.1.0-*", "vmlinuz")
}

// KernelDeb is the kernel package for VM tests: the one that KernelDebEnv
// names, or the last by name in the cache. It is empty when there is none.
func KernelDeb() string {
	return named(KernelDebEnv, "apt", "debs", "*-linux-image-*-cloud-amd64.deb")
}

func named(env string, inCache ...string) string {
	name := os.Getenv(env)
	if name == "" {
		found, _ := filepath.Glob(filepath.Join(append([]string{Cache()}, inCache...)...)) // the pattern is well-formed
		if len(found) == 0 {
			return ""
		}
		name = found[len(found)-1]
	}
	if st, err := os.Stat(name); err != nil || !st.Mode().IsRegular() {
		return ""
	}
	return name
}

// Cache is where klatch-forge keeps kernels and images when nobody says
// otherwise (package datadir, which this package must not import: everybody's tests
// import it).
func Cache() string {
	if dir := os.Getenv("KLATCH_CACHE"); dir != "" {
		return dir
	}
	if os.Getuid() == 0 {
		return "/var/cache/klatch"
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "klatch")
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func allInPath(programs ...string) func() bool {
	return func() bool {
		for _, p := range programs {
			if _, err := exec.LookPath(p); err != nil {
				return false
			}
		}
		return true
	}
}
