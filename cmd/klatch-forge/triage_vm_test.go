// SPDX-License-Identifier: Apache-2.0

//go:build vm

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/testkit/kerneltest"
)

// Whether a stock kernel is affected by a flaw in a file is known from what
// it was compiled from, not from the file's ending.
func TestTriageKnowsWhatTheKernelIsCompiledFrom(t *testing.T) {
	k := kerneltest.Prepared(t)
	var lines strings.Builder
	for i, path := range []string{"net/unix/garbage.c", "kernel/sched/rt.c", "include/net/sock.h", "drivers/net/can/usb/peak_usb/pcan_usb.c",
		"arch/arm64/include/asm/kvm_host.h", "drivers/no/such/file.c"} {
		fmt.Fprintf(&lines, `{"cve":"CVE-2026-%04d","title":"a flaw in %s","files":["%s"],"dyad":["0:0:6.1.99999:bbbbbbb"],`+
			`"cvss_vectors":{"kernel_cna":"CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H"}}`+"\n", i, path, path)
	}
	from := filepath.Join(t.TempDir(), "cna.jsonl")
	if err := os.WriteFile(from, []byte(lines.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := dataFolder(t, nil)
	if err := catalog.Save(dir, k.Entry); err != nil {
		t.Fatal(err)
	}
	flags := []string{"--dir", dir, "--cache", k.Cache, "--quiet", "triage"}
	with := func(more ...string) []string { return append(append([]string{}, flags...), more...) }
	release := string(k.Entry.Release)
	text, err := run(t, with("--kernel", release, "--feed", from, "--json", "--all")...)
	if err != nil {
		t.Fatal(err)
	}
	var rep struct {
		Version int
		CVEs    []struct{ CVE, Treatment, Rule, Status string }
		Counts  map[string]int
	}
	if err := json.Unmarshal([]byte(text), &rep); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, r := range rep.CVEs {
		got[r.CVE] = r.Treatment + " " + r.Rule
	}
	for id, want := range map[string]string{
		"CVE-2026-0000": "livepatch cvss",         // compiled
		"CVE-2026-0001": "livepatch cvss",         // included in kernel/sched/build_policy.c
		"CVE-2026-0002": "livepatch cvss",         // a header
		"CVE-2026-0003": "not_affected not_built", // there, and not in this config
		"CVE-2026-0004": "not_affected not_built", // of another architecture
		"CVE-2026-0005": "livepatch cvss",         // mainline's path; nobody can say
	} {
		if got[id] != want {
			t.Errorf("%s: %q, want %q", id, got[id], want)
		}
	}
	if rep.Version != 1 || rep.Counts["livepatch"] != 4 || rep.Counts["not_affected"] != 2 {
		t.Errorf("version %d, counts %v", rep.Version, rep.Counts)
	}
	if text, err := run(t, with("show", "CVE-2026-0003", "--kernel", release, "--feed", from)...); err != nil || !strings.Contains(text, "compiles none of drivers/net/can") {
		t.Errorf("show: %v\n%s", err, text)
	}
	if _, err := run(t, with("show", "CVE-2026-9999", "--kernel", release, "--feed", from)...); fault.CodeOf(err) != "no_cve" {
		t.Errorf("show of an unknown one: %v", err)
	}
	if text, err := run(t, with("review", "--kernel", release, "--feed", from)...); err != nil || !strings.Contains(text, "; 0 wait for a person\n") {
		t.Errorf("review: %v\n%s", err, text)
	}
}
