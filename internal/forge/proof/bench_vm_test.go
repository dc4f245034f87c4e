// SPDX-License-Identifier: Apache-2.0

//go:build vm

package proof_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// measure loads a livepatch, waits for its transition, and takes it out again,
// all in the guest, by the guest's clock; it prints two times in nanoseconds.
const measure = `
t0=$(cut -d' ' -f1 /proc/uptime | tr -d .)
insmod /lab/klatch_1.ko || exit 1
t1=$(cut -d' ' -f1 /proc/uptime | tr -d .)
while [ "$(cat /sys/kernel/livepatch/klatch_1/transition)" = 1 ]; do usleep 10000; done
t2=$(cut -d' ' -f1 /proc/uptime | tr -d .)
echo 0 > /sys/kernel/livepatch/klatch_1/enabled
while [ -d /sys/kernel/livepatch/klatch_1 ]; do usleep 10000; done
rmmod klatch_1
echo $((t1 - t0)) $((t2 - t1))`

// BenchmarkLoad is the time with a livepatch going in: from insmod's start to
// its end, and from there to the end of the transition, on an idle guest under
// emulation. The clock has hundredths of a second.
func BenchmarkLoad(b *testing.B) {
	testkit.Need(b, "qemu")
	k := kerneltest.Prepared(b)
	res := fixed(b, k, 1)
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(b), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		b.Fatal(err)
	}
	m, err := rig.Boot(b.Context(), lab.Spec{Name: "bench", Kernel: k.Tree.Image(), Files: []lab.File{{Name: "klatch_1.ko", Source: res.Module.Path}}})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	var load, transition float64
	b.ResetTimer()
	for range b.N {
		out, err := m.Run(b.Context(), lab.Command{Argv: []string{"sh", "-c", measure}})
		if err != nil || out.Exit != 0 {
			b.Fatalf("%v: %d %s", err, out.Exit, out.Stderr)
		}
		fields := strings.Fields(string(out.Stdout))
		for i, to := range []*float64{&load, &transition} {
			n, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				b.Fatal(err)
			}
			*to += n * 10
		}
	}
	b.ReportMetric(load/float64(b.N), "load-ms/op")
	b.ReportMetric(transition/float64(b.N), "transition-ms/op")
}
