// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/cli"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// command runs klatch-server in this process.
func command(t *testing.T, want int, args ...string) (stdout, stderr string) {
	t.Helper()
	root := newRoot()
	var o, e bytes.Buffer
	root.SetOut(&o)
	root.SetErr(&e)
	root.SetArgs(args)
	if status := cli.RunContext(t.Context(), root); status != want {
		t.Fatalf("%q: exit status %d, want %d\n%s%s", args, status, want, &o, &e)
	}
	return o.String(), e.String()
}

func tree(t *testing.T, dir string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "*", "*", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range found {
		if strings.Contains(f, ".klatch-fetch") {
			continue
		}
		rel, err := filepath.Rel(dir, f)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, strings.ReplaceAll(rel, "debian-12/amd64/6.1.0-", ""))
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// TestTheDownloader: the four actions, with several filters at once, and what
// is refused.
func TestTheDownloader(t *testing.T) {
	now := time.Now()
	p := pubsim.New(t, "acme", now)
	cloud, plain, old := pubsim.Kernel("6.1.0-50-cloud-amd64", 1), pubsim.Kernel("6.1.0-50-amd64", 2), pubsim.Kernel("6.1.0-9-cloud-amd64", 3)
	var one string
	for s := livepatch.Sequence(1); s <= 3; s++ {
		path := p.Release(now, cloud, s, "CVE-2026-0001")
		if s == 1 {
			one = path
		}
		stem := strings.TrimSuffix(path, ".lpb")
		p.Publish(now, tufrepo.Target{Path: stem + ".tlog-proof", Content: []byte("proof of " + path)})
	}
	p.Release(now, plain, 1, "CVE-2026-0001")
	p.Release(now, old, 1)
	signed, err := trustsign.Recalls(livepatch.Recalls{Format: livepatch.RecallsFormat, Version: 1, Issued: now, Entries: []livepatch.Recall{{Kernel: cloud.ID, Sequence: 3, Reason: "it hangs"}}}, p.Note)
	if err != nil {
		t.Fatal(err)
	}
	before := p.Read("metadata/timestamp.json")
	p.Publish(now, tufrepo.Target{Path: livepatch.RecallsPath(1), Content: signed})
	anchor, err := trustsign.Anchor(*p.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	anchorFile := filepath.Join(t.TempDir(), "anchor.json")
	if err := os.WriteFile(anchorFile, anchor, 0o600); err != nil {
		t.Fatal(err)
	}
	look := []string{"--from", p.Serve(), "--anchor", anchorFile, "--allow-lab", "--dir", dir}
	run := func(want int, args ...string) (string, string) {
		t.Helper()
		return command(t, want, slices.Concat([]string{"fetch"}, args, look)...)
	}

	out, _ := run(0, "list", "--json", "--kernel", "*-cloud-amd64", "--min-kernel", "6.1.0-40", "--distro", "debian-*")
	var list struct {
		Livepatches []item `json:"livepatches"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.Livepatches) != 3 || !list.Livepatches[0].Recalled || list.Livepatches[1].Recalled ||
		list.Livepatches[1].Sequence != 2 || list.Livepatches[1].BuildID != cloud.ID.String() || list.Livepatches[1].Released.IsZero() {
		t.Errorf("%v: %s", err, out)
	}
	if out, _ = run(0, "list", "--newest"); strings.Count(out, "\n") != 4 || strings.Contains(out, "klatch_3") {
		t.Error(out)
	}
	if tree(t, dir) != "" {
		t.Error("list fetched something")
	}
	run(0, "newest", "--kernel", "*-cloud-amd64", "--min-kernel", "6.1.0-40")
	if got := tree(t, dir); got != "50-cloud-amd64/klatch_2.lpb 50-cloud-amd64/klatch_2.tlog-proof" {
		t.Error(got)
	}
	if out, _ = run(0, "newest", "--kernel", "*-cloud-amd64", "--min-kernel", "6.1.0-40"); !strings.Contains(out, "was here") {
		t.Error(out)
	}
	run(0, "get", one)
	_, stderr := run(3, "get", strings.Replace(one, "_1", "_3", 1))
	if !strings.Contains(stderr, "taken back") || !strings.Contains(stderr, "hint: ") {
		t.Error(stderr)
	}
	run(3, "get", strings.Replace(one, "_1", "_9", 1))

	// A file that was damaged here is fetched again; lies are refused.
	damaged := filepath.Join(dir, filepath.FromSlash(one))
	if err := os.WriteFile(damaged, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(p.Dir, "targets", "debian-12", "amd64", string(cloud.Release), "*.klatch_1.lpb"))
	if err != nil || len(blobs) != 1 {
		t.Fatal(blobs, err)
	}
	name, err := filepath.Rel(p.Dir, blobs[0])
	if err != nil {
		t.Fatal(err)
	}
	p.Lie("/"+filepath.ToSlash(name), func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("lies")) })
	run(3, "get", one)
	p.Lie("/"+filepath.ToSlash(name), nil)
	if out, _ = run(0, "get", one); !strings.Contains(out, "fetched") {
		t.Error(out)
	}

	if err := os.WriteFile(filepath.Join(dir, "debian-12", "amd64", string(cloud.Release), "notes.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, 2, "fetch", "prune", "--dir", dir, "--keep", "0")
	if out, _ = command(t, 0, "fetch", "prune", "--dir", dir, "--keep", "1"); strings.Count(out, "removed ") != 2 {
		t.Error(out)
	}
	if got := tree(t, dir); got != "50-cloud-amd64/klatch_2.lpb 50-cloud-amd64/klatch_2.tlog-proof 50-cloud-amd64/notes.txt" {
		t.Error(got)
	}
	// The folder remembers: an older repository is refused.
	p.Write("metadata/timestamp.json", before)
	if _, stderr := run(3, "list"); !strings.Contains(stderr, "older state than before") {
		t.Error(stderr)
	}
}
