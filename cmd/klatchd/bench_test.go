// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"klatch/internal/machine/agent"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderclient"
	"klatch/internal/machine/remote"
	"klatch/internal/trust"
)

// BenchmarkCheckWithNothingNew is the hourly cost of a machine: one check over
// TLS with the signed metadata, in this process. It reports the bytes on the
// wire, handshake included where the connection is new.
func BenchmarkCheckWithNothingNew(b *testing.B) {
	r := newRig(b)
	r.enroll()
	log := slog.New(slog.DiscardHandler)
	client, err := remote.Open(r.state, log)
	if err != nil {
		b.Fatal(err)
	}
	policy := agent.DefaultPolicy()
	policy.CheckInterval = 0
	a, err := agent.New(agent.Config{
		Dir: r.state, Version: "bench", Policy: policy, Log: log, Machine: facts.Machine{Root: r.machine.Root}, Server: client,
		Repository: remote.Repository{Client: client, Dir: filepath.Join(r.state, "metadata")}, Loader: loaderclient.Dial(r.loader),
		Anchor: func() (*trust.Anchor, error) { return readAnchor(r.machine.Root) },
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, nil) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}()
	if err := a.CheckNow(ctx); err != nil { // the first fetches the whole metadata
		b.Fatal(err)
	}
	before := r.fleet.Bytes()
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		if err := a.CheckNow(ctx); err != nil {
			b.Fatal(err)
		}
		n++
	}
	b.ReportMetric(float64(r.fleet.Bytes()-before)/float64(n), "wire-bytes/op")
	if c := a.Status(ctx).Check; c.Result != "current" {
		b.Errorf("check %+v", c)
	}
}

// BenchmarkIdleProcess starts a real klatchd, lets it take a livepatch, and
// reports its memory while it has nothing to do.
func BenchmarkIdleProcess(b *testing.B) {
	for b.Loop() {
		r := newRig(b)
		r.enroll()
		r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
		r.machine.Write("etc/klatch/conf.d/50-test.toml", "check_interval = \"5s\"\nsoak = \"1s\"\n")
		r.start()
		r.until("confirmed", confirmed)
		r.kill()
		r.machine.Write("etc/klatch/conf.d/50-test.toml", "check_interval = \"1h\"\n")
		r.start()
		r.until("idle", confirmed)
		time.Sleep(10 * time.Second) // until what the start used is given back
		b.ReportMetric(r.proc(`VmRSS:\s+(\d+)`), "RSS-KiB")
		r.kill()
	}
}

// proc reads one number of /proc/PID/status.
func (r *rig) proc(pattern string) float64 {
	r.t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(r.cmd.Process.Pid), "status"))
	if err != nil {
		r.t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindSubmatch(status)
	if m == nil {
		r.t.Fatalf("no %s in\n%s", pattern, status)
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}
