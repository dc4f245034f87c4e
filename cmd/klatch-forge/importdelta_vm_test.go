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
	"klatch/internal/forge/flood"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// TestTheFloodIsAccountedFor takes the real difference between the test
// kernel's source and a newer upload, for a few CVEs of each kind: those that
// can be livepatched, are refused, are not in this kernel build, are not
// urgent, are rated by nobody, and of which nobody knows the files.
func TestTheFloodIsAccountedFor(t *testing.T) {
	k := kerneltest.Prepared(t)
	to := newerUpload(t, k)
	feed := filepath.Join(t.TempDir(), "cna.jsonl")
	var lines strings.Builder
	record := func(n int, vector string, files ...string) {
		quoted, err := json.Marshal(files)
		if err != nil {
			t.Fatal(err)
		}
		vectors := "{}"
		if vector != "" {
			vectors = fmt.Sprintf(`{"kernel_cna":%q}`, vector)
		}
		// Fixed in the point release that the newer upload is made of.
		upstream, _, _ := strings.Cut(to, "-")
		fmt.Fprintf(&lines, `{"cve":"CVE-2026-%d","title":"a flaw","files":%s,"dyad":["2.6.12:0:%s:bbbbbbb"],"cvss_vectors":%s}`+"\n", n, quoted, upstream, vectors)
	}
	const high, low = "CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H", "CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:L/I:N/A:N"
	record(900001, high, "net/unix/af_unix.c")
	record(900002, high, "kernel/time/namespace.c", "drivers/gpu/drm/amd/amdgpu/amdgpu_cs.c")
	record(900003, high, "drivers/gpu/drm/amd/amdgpu/amdgpu_cs.c")
	record(900004, low, "net/unix/af_unix.c")
	record(900005, "", "net/unix/af_unix.c")
	record(900006, high)
	record(900007, high, "arch/arm64/kvm/arm.c")
	if err := os.WriteFile(feed, []byte(lines.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	only := filepath.Join(t.TempDir(), "cves")
	ids := "# seven of each kind\n"
	for n := 900001; n <= 900007; n++ {
		ids += fmt.Sprintf("CVE-2026-%d\n", n)
	}
	if err := os.WriteFile(only, []byte(ids), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := dataFolder(t, nil)
	if err := catalog.Save(dir, k.Entry); err != nil {
		t.Fatal(err)
	}
	release := string(k.Entry.Release)
	args := []string{"--dir", dir, "--cache", k.Cache, "--quiet", "import-delta", "--kernel", release, "--to", to, "--feed", feed, "--cves", only, "--json"}
	first := ledgerOf(t, args)
	status := map[string]flood.Entry{}
	for _, e := range first.Entries {
		if _, twice := status[string(e.CVE)]; twice {
			t.Errorf("%s stands twice", e.CVE)
		}
		status[string(e.CVE)] = e
	}
	for id, want := range map[string]flood.Status{
		"CVE-2026-900003": flood.NotAffected, "CVE-2026-900004": flood.BelowPolicy, "CVE-2026-900005": flood.Unrated,
		"CVE-2026-900006": flood.NoData, "CVE-2026-900007": flood.NotAffected,
	} {
		if status[id].Status != want || status[id].Reason == "" {
			t.Errorf("%s: %+v, want %s", id, status[id], want)
		}
	}
	if len(status) != 7 || first.Total != 7 || first.Kernel != k.Entry.Release || first.To != to {
		t.Errorf("ledger of %d, total %d, %s to %s", len(status), first.Total, first.Kernel, first.To)
	}
	one := status["CVE-2026-900001"]
	if one.Status != flood.Livepatched || first.Livepatch == nil || first.Livepatch.Functions == 0 {
		t.Fatalf("af_unix.c: %+v, livepatch %+v, trouble %q", one, first.Livepatch, first.Trouble)
	}
	patches, err := queue.Open(dir, k.Entry.Series).List()
	if err != nil || len(patches) == 0 {
		t.Fatalf("the queue has %d source patches, %v", len(patches), err)
	}
	for _, p := range patches {
		for _, id := range p.Fixes {
			if status[string(id)].Status != flood.Livepatched {
				t.Errorf("source patch %s claims %s, which the ledger calls %s", p.Name, id, status[string(id)].Status)
			}
		}
		if p.Origin != k.Entry.Source+" "+to {
			t.Errorf("origin %q", p.Origin)
		}
	}
	// A second run finds everything in the queue: the same livepatch.
	second := ledgerOf(t, args)
	if second.Livepatch == nil || second.Livepatch.SHA256 != first.Livepatch.SHA256 || second.Livepatch.Sequence != first.Livepatch.Sequence {
		t.Errorf("second run: %+v, first %+v", second.Livepatch, first.Livepatch)
	}
	if second.Counts[flood.Livepatched] != first.Counts[flood.Livepatched] {
		t.Errorf("second run: %v, first %v", second.Counts, first.Counts)
	}
	if _, err := run(t, append(args, "--memory", "100")...); fault.KindOf(err) != fault.Invalid {
		t.Errorf("too little memory: %v", err)
	}
}

func ledgerOf(t *testing.T, args []string) flood.Ledger {
	t.Helper()
	text, err := run(t, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	var l flood.Ledger
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return l
}

// newerUpload is the oldest version of the source package that is newer than
// the test kernel's and has other fixes for both files.
func newerUpload(t *testing.T, k kerneltest.Kernel) string {
	t.Helper()
	all, err := k.Maker.Archive.Versions(t.Context(), k.Entry.Source)
	if err != nil || len(all) == 0 {
		t.Fatalf("versions of %s: %v", k.Entry.Source, err)
	}
	to := ""
	for _, p := range all { // newest first
		if p.Version == k.Entry.SourceV {
			break
		}
		to = p.Version
	}
	if to == "" {
		t.Fatalf("the archive has no newer %s than %s", k.Entry.Source, k.Entry.SourceV)
	}
	return to
}
