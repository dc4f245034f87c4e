// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/layout"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// BenchmarkBuild is a one-file fix on a prepared kernel, by step: cold compiles
// the unpatched objects, warm finds them in the cache.
func BenchmarkBuild(b *testing.B) {
	k := kerneltest.Prepared(b)
	p := edit(b, k, "net/unix/af_unix.c", nopIn(dgramSendmsg))
	for _, c := range []struct {
		name  string
		fresh bool
	}{{"warm", false}, {"cold", true}} {
		b.Run(c.name, func(b *testing.B) {
			sum := map[string]float64{}
			for range b.N {
				cache := k.Cache
				if c.fresh {
					b.StopTimer()
					cache = kerneltest.OtherCache(b, k, nil)
					b.StartTimer()
				}
				plan, err := compose.New(k.Entry, []queue.Patch{p}, k.Tools.Version(), 1)
				if err != nil {
					b.Fatal(err)
				}
				res, err := build.Run(b.Context(), &objbuild.Driver{Cache: cache, Tools: k.Tools}, plan, b.TempDir(), build.NewClock(nil))
				if err != nil || res.Result != build.Built {
					b.Fatalf("%v: %+v", err, res)
				}
				for step, s := range res.Seconds {
					sum[step] += s
				}
			}
			for step, s := range sum {
				b.ReportMetric(s/float64(b.N), step+"-s/op")
			}
			if st, err := os.Stat(k.Tree.Vmlinux()); err == nil {
				b.ReportMetric(float64(st.Size())/1e6, "vmlinux-MB")
			}
		})
	}
}

// BenchmarkTypes reads the types of a large object of the kernel.
func BenchmarkTypes(b *testing.B) {
	k := kerneltest.Prepared(b)
	tree := kerneltree.At(kerneltest.OtherCache(b, k, nil), k.Entry).Source()
	const object = "net/ipv4/tcp_input.o"
	argv := kerneltree.Make(k.Entry, "KCFLAGS=-g -gdwarf-5 -fno-eliminate-unused-debug-types", object)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = tree
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(tree, object))
	if err != nil {
		b.Fatal(err)
	}
	types, err := layout.Read(text)
	if err != nil {
		b.Fatal(err)
	}
	stored, err := types.Encode()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("read", func(b *testing.B) {
		b.SetBytes(int64(len(text)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := layout.Read(text); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("stored", func(b *testing.B) {
		b.SetBytes(int64(len(stored)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := layout.Decode(stored); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("compare", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if cs := layout.Compare(types, types); len(cs) > 0 {
				b.Fatal(cs)
			}
		}
	})
}
