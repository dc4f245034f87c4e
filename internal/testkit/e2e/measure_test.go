// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/livepatch"
)

// benchFile names a file that TestVMMeasure writes its numbers to, in the form
// of go test -bench: bench/baseline-DATE.txt was made so.
const benchFile = "KLATCH_BENCH_FILE"

// TestVMMeasure takes the numbers that users feel. It fails only where one
// could not be taken, or is beyond anything reasonable.
func TestVMMeasure(t *testing.T) {
	s := newStory(t, "check_interval = \"0\"\nsoak = \"1s\"\n")
	var out strings.Builder
	add := func(name string, n int, format string, args ...any) {
		fmt.Fprintf(&out, "Benchmark%s %d %s\n", name, n, fmt.Sprintf(format, args...))
	}
	number := func(text string) int64 {
		t.Helper()
		n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}

	seconds := s.made.builds[2].Seconds
	for _, step := range slices.Sorted(maps.Keys(seconds)) {
		add("Build/two-fixes/"+step, 1, "%.0f ns/op", seconds[step]*1e9)
	}
	raw, res := s.made.module(t, 2)
	add("Build/two-fixes/module", 1, "%d B/module %d functions-proved", len(raw), res.Match.Identical)

	// A check with nothing new, and what the daemon is when it sleeps.
	s.run("klatch", "check")
	const checks = 10
	traffic := func() int64 {
		return number(s.sh("cd /sys/class/net/e*/statistics && echo $(($(cat rx_bytes) + $(cat tx_bytes)))"))
	}
	cpu := func() int64 { return number(s.run("systemctl", "show", "-P", "CPUUsageNSec", "klatchd.service")) }
	bytes, used, began := traffic(), cpu(), time.Now()
	for range checks {
		s.run("klatch", "check")
	}
	took := time.Since(began)
	bytes, used = traffic()-bytes, cpu()-used
	add("Check/nothing-new", checks, "%d ns/op %d cpu-ns/op %d B-on-the-wire/op", took.Nanoseconds()/checks, used/checks, bytes/checks)
	<-time.After(3 * time.Second)
	status := s.sh("cat /proc/$(systemctl show -P MainPID klatchd.service)/status")
	rss := regexp.MustCompile(`VmRSS:\s+([0-9]+) kB`).FindStringSubmatch(status)
	if rss == nil {
		t.Fatal(status)
	}
	add("Klatchd/idle", 1, "%d B-resident", number(rss[1])<<10)
	if number(rss[1]) > 64<<10 || bytes/checks > 64<<10 {
		t.Errorf("klatchd has %s KiB, a check takes %d bytes", rss[1], bytes/checks)
	}

	// The whole way of a livepatch, then the kernel's part of it alone.
	s.offer(1)
	<-time.After(3 * time.Second) // the server notices a sync within two
	began = time.Now()
	s.run("klatch", "check")
	s.confirmed(1)
	add("Journey/offer-to-confirmed-with-1s-soak", 1, "%d ns/op", time.Since(began).Nanoseconds())
	var load, move int64
	const loads = 5
	for n := livepatch.Sequence(2); n < 2+loads; n++ {
		b := s.pub.livepatch(n)
		s.put("/tmp/module", b.Module)
		f := strings.Fields(s.run(hostile, "insmod", "/tmp/module", n.ModuleName()))
		load, move = load+number(f[0]), move+number(f[1])
	}
	add("Kernel/finit_module", loads, "%d ns/op", load/loads)
	add("Kernel/transition", loads, "%d ns/op", move/loads)
	s.restart(s.Reboot)
	s.confirmed(1)
	at := func(stamp string) int64 { return int64(s.monotonic("klatch-loader-boot.service", stamp)) }
	add("Boot/loader-unit", 1, "%d ns/op", (at("ActiveEnterTimestampMonotonic")-at("InactiveExitTimestampMonotonic"))*1000)

	head := fmt.Sprintf("goos: linux\ngoarch: %s\npkg: klatch/internal/testkit/e2e\ncpu: %s\nhost-kernel: %s\nguest: %s, %s, 2 CPUs, emulated (TCG)\ngo: %s\n",
		runtime.GOARCH, field(t, "/proc/cpuinfo", `model name\s*: (.*)`), field(t, "/proc/sys/kernel/osrelease", `([0-9.]+)`), "Debian 12", s.made.image.Release, runtime.Version())
	t.Logf("\n%s%s", head, &out)
	if name := os.Getenv(benchFile); name != "" {
		if err := os.WriteFile(name, []byte(head+out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func field(t *testing.T, file, pattern string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindSubmatch(b)
	if m == nil {
		return "unknown"
	}
	return string(m[1])
}
