// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"os"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
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
