// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// figured are files of vmlinux and of modules whose every function is compared
// with the distribution's own.
var figured = []string{
	"fs/pipe.c", "net/ipv4/icmp.c", "kernel/fork.c", "mm/mmap.c", "net/core/sock.c", "fs/namei.c", "net/ipv4/tcp_input.c",
	"net/unix/af_unix.c", "kernel/sys.c", "net/packet/af_packet.c",
	"drivers/net/tun.c", "drivers/net/dummy.c", "drivers/net/veth.c", "drivers/block/loop.c", "net/sctp/socket.c", "fs/xfs/xfs_inode.c",
	"net/netfilter/nf_tables_api.c", "net/ipv4/ip_gre.c", "fs/fuse/dir.c", "fs/fat/namei_vfat.c", "drivers/md/dm.c",
}

// explained are the reasons why a function of an object may not be the
// kernel's: the linker took another one, there are two with the same code (then
// none may be replaced), or in separate sections the compiler
// writes a jump otherwise; then it is compared as shipped before a livepatch
// may replace it.
var explained = []string{"the kernel has no function of this name from this file", "bytes, the kernel's has", "differs at", "identical functions of this name"}

// TestFiguresOfTheMatchProof prints for each object how many of its functions
// are byte for byte the kernel's, and why others are not.
func TestFiguresOfTheMatchProof(t *testing.T) {
	k := kerneltest.Prepared(t)
	d := &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}
	check := func(files ...string) build.Result {
		t.Helper()
		var ps []queue.Patch
		for _, f := range files {
			// A function that nobody calls: everything else must be the same.
			ps = append(ps, edit(t, k, f, func(s string) string {
				return s + "\nint klatch_figure(void);\nint klatch_figure(void)\n{\n\treturn 1;\n}\n"
			}))
		}
		plan, err := compose.New(k.Entry, ps, k.Tools.Version(), 1)
		if err != nil {
			t.Fatal(err)
		}
		res, err := d.Check(t.Context(), plan, build.NewClock(nil))
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	check(figured...) // compiles side by side
	checked, identical := 0, 0
	for _, f := range figured {
		res := check(f)
		m := res.Match
		t.Logf("%-32s %4d functions, %4d identical", f, m.Checked, m.Identical)
		if m.Checked == 0 {
			t.Errorf("%s: nothing compared: %+v", f, res.Refusals)
		}
		checked += m.Checked
		identical += m.Identical
		for _, x := range m.Different {
			t.Logf("    %s of %s: %s", x.Function, x.Object, x.Why)
			if !slices.ContainsFunc(explained, func(why string) bool { return strings.Contains(x.Why, why) }) {
				t.Errorf("%s: %s differs for another reason: %s", f, x.Function, x.Why)
			}
		}
	}
	t.Logf("%d objects: %d of %d functions identical", len(figured), identical, checked)
	if identical*100 < checked*99 {
		t.Errorf("%d of %d functions are the kernel's own, want 99 of 100", identical, checked)
	}
}
