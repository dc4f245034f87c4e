// SPDX-License-Identifier: Apache-2.0

package notices_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/flood"
	"klatch/internal/forge/notices"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sign"
	"klatch/internal/forge/triage"
	"klatch/internal/kernel"
	"klatch/internal/notice"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func folder(t *testing.T) datadir.Dir {
	t.Helper()
	d, err := datadir.Make(t.TempDir(), datadir.Policy{Publisher: "example.org", Profile: trust.Lab})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func put(t *testing.T, d datadir.Dir, name, content string) {
	t.Helper()
	p := filepath.Join(d.Path, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// entry is a kernel build of Debian 12; n makes different ones.
func entry(n int, version string) catalog.Entry {
	return catalog.Entry{Release: kernel.Release(fmt.Sprintf("6.1.0-%d-cloud-amd64", n)), Distro: "debian-12", Arch: kernel.AMD64,
		BuildID: kernel.BuildID{byte(n)}, Series: "debian-6.1", Version: version, SourceV: version}
}

func save(t *testing.T, d datadir.Dir, e catalog.Entry) {
	t.Helper()
	if err := catalog.Save(d.Path, e); err != nil {
		t.Fatal(err)
	}
}

func ledger(t *testing.T, d datadir.Dir, e catalog.Entry, to, policy string, entries ...flood.Entry) {
	t.Helper()
	l := flood.Ledger{Version: 1, Kernel: e.Release, BuildID: e.BuildID, From: e.SourceV, To: to, Policy: policy, Entries: entries}
	b, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	put(t, d, fmt.Sprintf("ledger/%s_%s_%s.json", e.Release, to, policy), string(b))
}

func decision(t *testing.T, d datadir.Dir, id string, treatment triage.Treatment, more string) {
	t.Helper()
	status := "affected"
	if treatment == triage.NotAffected {
		status = "not_affected\njustification: vulnerable_code_not_present"
	}
	put(t, d, "cve/2026/"+id+".yaml", fmt.Sprintf("cve: %s\nstatus: %s\ntreatment: %s\nreason: a person's reason\nauthor: A Person <a@example.org>\ndate: 2026-11-20\n%s",
		id, status, treatment, more))
}

// on is what a kernel's machines would be told, and of which decisions nobody
// knows whether they concern it.
func on(t *testing.T, d datadir.Dir, e catalog.Entry, fixed ...cve.ID) (lines []string, untold int) {
	t.Helper()
	k, err := notices.Read(d, now)
	if err != nil {
		t.Fatal(err)
	}
	n, left := k.On(e, fixed)
	if _, err := n.Encode(); err != nil {
		t.Fatal(err)
	}
	for _, c := range n.CVEs {
		lines = append(lines, fmt.Sprintf("%s %s %s: %s", c.ID, c.Code, c.Advice, c.Text))
	}
	return lines, len(left)
}

func same(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: told %q, want %q", what, got, want)
	}
}

func TestRefusedIsToldToThatKernelBuildOnly(t *testing.T) {
	d := folder(t)
	old, newer := entry(50, "6.1.176-1"), entry(54, "6.1.190-1")
	ledger(t, d, old, "6.1.187-1", "default",
		flood.Entry{CVE: "CVE-2026-0001", Status: flood.Refused, Code: "layout_changed", Reason: "a type changes", File: "net/unix/af_unix.c", Place: "struct unix_sock"},
		flood.Entry{CVE: "CVE-2026-0002", Status: flood.Livepatched, Reason: "in it"},
		flood.Entry{CVE: "CVE-2026-0003", Status: flood.BelowPolicy, Reason: "low"},
		flood.Entry{CVE: "CVE-2026-0004", Status: flood.Refused, Code: "init_code", Reason: "runs at boot\nonly"})
	ledger(t, d, old, "6.1.187-1", "everything", flood.Entry{CVE: "CVE-2026-0003", Status: flood.Refused, Code: "assembly", Reason: "assembly"})
	got, _ := on(t, d, old)
	same(t, "the build of the ledger", got,
		"CVE-2026-0001 layout_changed update_and_reboot: net/unix/af_unix.c, struct unix_sock: a type changes",
		"CVE-2026-0004 init_code update_and_reboot: runs at boot only")
	got, _ = on(t, d, newer)
	same(t, "another build of the series", got)
	got, _ = on(t, d, old, "CVE-2026-0001")
	same(t, "with a livepatch that fixes one", got, "CVE-2026-0004 init_code update_and_reboot: runs at boot only")

	// A later ledger knows better, whatever its file is called.
	ledger(t, d, old, "6.1.1000-1", "default",
		flood.Entry{CVE: "CVE-2026-0001", Status: flood.Refused, Code: "header_fanout", Reason: "too many files"},
		flood.Entry{CVE: "CVE-2026-0004", Status: flood.Livepatched, Reason: "in it"})
	got, _ = on(t, d, old)
	same(t, "with a later ledger", got, "CVE-2026-0001 header_fanout update_and_reboot: too many files")
}

// TestADecisionIsToldWhereTheFlawIs: a decision speaks of a series, and a kernel
// build of it that has the fix must not be told to reboot.
func TestADecisionIsToldWhereTheFlawIs(t *testing.T) {
	old, newer := entry(50, "6.1.176-1"), entry(54, "6.1.190-1")
	t.Run("nobody knows", func(t *testing.T) {
		d := folder(t)
		decision(t, d, "CVE-2026-0001", triage.Reboot, "")
		got, untold := on(t, d, old)
		same(t, "old", got)
		if untold != 1 {
			t.Errorf("%d decisions are said to be untold", untold)
		}
	})
	t.Run("by fixed_in", func(t *testing.T) {
		d := folder(t)
		decision(t, d, "CVE-2026-0001", triage.Reboot, "series: [debian-6.1]\nfixed_in: 6.1.187-1\n")
		got, untold := on(t, d, old)
		same(t, "old", got, "CVE-2026-0001 decided update_and_reboot: a person's reason")
		new, untoldNew := on(t, d, newer)
		same(t, "newer", new)
		if untold+untoldNew != 0 {
			t.Errorf("%d and %d are untold", untold, untoldNew)
		}
	})
	t.Run("another series", func(t *testing.T) {
		d := folder(t)
		decision(t, d, "CVE-2026-0001", triage.Reboot, "series: [debian-6.12]\nfixed_in: 6.12.100-1\n")
		got, untold := on(t, d, old)
		same(t, "old", got)
		if untold != 0 {
			t.Errorf("%d untold", untold)
		}
	})
	t.Run("by the ledger", func(t *testing.T) {
		d := folder(t)
		ledger(t, d, old, "6.1.187-1", "default",
			flood.Entry{CVE: "CVE-2026-0001", Status: flood.BelowPolicy, Reason: "a person said so"},
			flood.Entry{CVE: "CVE-2026-0002", Status: flood.Refused, Code: "layout_changed", Reason: "a type changes"},
			flood.Entry{CVE: "CVE-2026-0003", Status: flood.NotAffected, Code: "config", Reason: "not built"},
			flood.Entry{CVE: "CVE-2026-0004", Status: flood.Unrated, Reason: "nobody rates it"},
			flood.Entry{CVE: "CVE-2026-0005", Status: flood.Refused, Code: "layout_changed", Reason: "a type changes"},
			flood.Entry{CVE: "CVE-2026-0006", Status: flood.Refused, Code: "layout_changed", Reason: "a type changes"})
		for id, what := range map[string]triage.Treatment{"CVE-2026-0001": triage.Reboot, "CVE-2026-0002": triage.Reboot, "CVE-2026-0003": triage.Reboot,
			"CVE-2026-0004": triage.Defer, "CVE-2026-0005": triage.NotAffected, "CVE-2026-0006": triage.Livepatch} {
			decision(t, d, id, what, "")
		}
		got, untold := on(t, d, old)
		same(t, "old", got,
			"CVE-2026-0001 decided update_and_reboot: a person's reason",
			"CVE-2026-0002 layout_changed update_and_reboot: a type changes",
			"CVE-2026-0004 deferred wait: a person's reason",
			"CVE-2026-0006 layout_changed update_and_reboot: a type changes")
		if untold != 0 {
			t.Errorf("%d untold", untold)
		}
	})
}

// TestWhatTheQueueRefusedIsToldOnceAPersonDecided: a refused build is work in
// progress; the decision is a person's, the code the builder's.
func TestWhatTheQueueRefusedIsToldOnceAPersonDecided(t *testing.T) {
	d, e := folder(t), entry(50, "6.1.176-1")
	plan := compose.Plan{Kernel: e, Patches: []queue.Patch{
		{Name: "a", Fixes: []cve.ID{"CVE-2026-0001"}, Files: []string{"net/a.c"}},
		{Name: "b", Fixes: []cve.ID{"CVE-2026-0002", "CVE-2026-0003"}, Files: []string{"include/net/b.h"}},
		{Name: "c", Fixes: []cve.ID{"CVE-2026-0004"}, Files: []string{"net/c.c"}},
		{Name: "d", Fixes: []cve.ID{"CVE-2026-0005"}, Files: []string{"net/d.c"}},
	}}
	keep := func(r build.Result) {
		t.Helper()
		if err := notices.Keep(d, plan, r); err != nil {
			t.Fatal(err)
		}
	}
	keep(build.Result{Result: build.Broken, Refusals: []build.Refusal{{Code: "layout_changed", File: "net/c.c"}}})
	keep(build.Result{Result: build.Built, Fixes: []cve.ID{"CVE-2026-0004"}})
	if _, err := os.Stat(filepath.Join(d.Path, "ledger")); err == nil {
		t.Error("nothing was refused, and something was kept")
	}
	keep(build.Result{Result: build.Refused, Refusals: []build.Refusal{
		{Code: "init_code", File: "net/a.c", Function: "a_init", Rule: "runs at boot only"},
		{Code: "layout_changed", File: "net/user.c", Through: []string{"include/net/b.h"}, Type: "struct b", Rule: "a type changes"},
		{Code: "nothing_changed", File: "net/d.c", Rule: "no object code changes"},
	}})
	got, _ := on(t, d, e)
	same(t, "before a decision", got)
	for _, id := range []string{"CVE-2026-0001", "CVE-2026-0002", "CVE-2026-0004"} {
		decision(t, d, id, triage.Reboot, "")
	}
	want := []string{"CVE-2026-0001 init_code update_and_reboot: net/a.c, a_init: runs at boot only",
		"CVE-2026-0002 layout_changed update_and_reboot: net/user.c, struct b: a type changes"}
	got, untold := on(t, d, e)
	same(t, "decided", got, want...)
	if untold != 1 {
		t.Errorf("%d untold, want the one that nothing was found out of", untold)
	}
	plan.Patches = plan.Patches[2:] // the refused ones leave the queue
	keep(build.Result{Result: build.Built, Fixes: []cve.ID{"CVE-2026-0004"}})
	got, _ = on(t, d, e)
	same(t, "after the queue was built without them", got, want...)
	keep(build.Result{Result: build.Built, Fixes: []cve.ID{"CVE-2026-0001"}})
	got, untold = on(t, d, e)
	same(t, "after one was built in another form", got, want[1])
	if untold != 2 {
		t.Errorf("%d untold", untold)
	}
}

func TestWhatCannotBeReadIsNotLeftOut(t *testing.T) {
	for name, file := range map[string]string{"ledger/x.json": "bad_ledger", "ledger/y.json": "bad_ledger", "cve/2026/CVE-2026-0001.yaml": "bad_review"} {
		d := folder(t)
		put(t, d, name, map[string]string{"ledger/x.json": "{", "ledger/y.json": `{"version": 2}`}[name])
		if _, _, err := notices.Targets(d, nil, now); fault.CodeOf(err) != fault.Code(file) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestNoticesArePublished goes through the repository as a machine reads it.
func TestNoticesArePublished(t *testing.T) {
	d := folder(t)
	if err := sign.MakeKeys(t.Context(), d, now); err != nil {
		t.Fatal(err)
	}
	dead, fine, silent := entry(50, "6.1.176-1"), entry(54, "6.1.190-1"), entry(56, "6.1.192-1")
	dead.Support = catalog.Support{Ended: "2026-11-25", Through: dead.Release, Reason: "too many open CVEs", Instead: fine.Release}
	fine.Support = catalog.Support{Until: "2027-06-30"}
	for _, e := range []catalog.Entry{dead, fine, silent} {
		save(t, d, e)
	}
	ledger(t, d, dead, "6.1.187-1", "default", flood.Entry{CVE: "CVE-2026-0001", Status: flood.Refused, Code: "layout_changed", Reason: "a type changes"})
	run := func(signed ...build.Result) tufrepo.Result {
		t.Helper()
		r, err := publish.Publish(t.Context(), d, signed, now)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	read := func(e catalog.Entry) (notice.Notice, bool) {
		t.Helper()
		raw, err := os.ReadFile(d.Anchor())
		if err != nil {
			t.Fatal(err)
		}
		anchor, err := trust.ParseAnchor(raw, true)
		if err != nil {
			t.Fatal(err)
		}
		base, client, err := tufclient.Source(d.Repository(), nil)
		if err != nil {
			t.Fatal(err)
		}
		snap, err := tufclient.Refresh(t.Context(), tufclient.Config{Root: anchor.Root, Dir: t.TempDir(), BaseURL: base, Client: client, Now: now})
		if err != nil {
			t.Fatal(err)
		}
		target, err := snap.Target(notice.TargetPath(e.Build()))
		if fault.KindOf(err) == fault.NotFound {
			return notice.Notice{}, false
		}
		if err != nil || !bytes.Contains(target.Custom, []byte(e.BuildID.String())) {
			t.Fatalf("custom %s, %v", target.Custom, err)
		}
		b, err := snap.Download(t.Context(), target, notice.MaxBytes)
		if err != nil {
			t.Fatal(err)
		}
		n, err := notice.Parse(b)
		if err != nil || n.Fits(e.Build()) != nil {
			t.Fatal(err, n)
		}
		return n, true
	}
	if r := run(); !r.Changed {
		t.Error("nothing was published")
	}
	if n, ok := read(dead); !ok || n.Support != dead.Support.Notice() || len(n.CVEs) != 1 || n.CVEs[0].Code != "layout_changed" {
		t.Errorf("of the dead kernel %t %+v", ok, n)
	}
	if n, ok := read(fine); !ok || n.Support.Until != "2027-06-30" || n.Support.Ended != "" || len(n.CVEs) != 0 {
		t.Errorf("of the newer kernel %t %+v", ok, n)
	}
	if _, ok := read(silent); ok {
		t.Error("a notice on a kernel of which nothing is known")
	}
	if r := run(); r.Changed {
		t.Error("publishing the same again changed the repository")
	}
	// A livepatch fixes what was refused; its bundle is not looked at here.
	k, err := notices.Read(d, now)
	if err != nil {
		t.Fatal(err)
	}
	fixed := notices.Fixed([]build.Result{{BuildID: dead.BuildID, Sequence: 2, Fixes: []cve.ID{"CVE-2026-0001"}}, {BuildID: dead.BuildID, Sequence: 1}}, dead.BuildID)
	if n, _ := k.On(dead, fixed); len(n.CVEs) != 0 {
		t.Errorf("fixed, and still told: %+v", n.CVEs)
	}
	// The marker is taken back, and the ledger's CVE turns out well.
	save(t, d, func() catalog.Entry { e := dead; e.Support = catalog.Support{Until: "2027-01-01"}; return e }())
	ledger(t, d, dead, "6.1.187-1", "default", flood.Entry{CVE: "CVE-2026-0001", Status: flood.Livepatched, Reason: "in it"})
	if r := run(); !r.Changed {
		t.Error("what is said anew was not published")
	}
	if n, ok := read(dead); !ok || n.Support.Ended != "" || len(n.CVEs) != 0 {
		t.Errorf("of the kernel that is dead no more %t %+v", ok, n)
	}
	// Nothing is said of any kernel any more.
	for _, e := range []catalog.Entry{dead, fine} {
		if err := os.Remove(filepath.Join(d.Path, "catalog", "debian-12", string(e.Release)+".toml")); err != nil {
			t.Fatal(err)
		}
		e.Support = catalog.Support{}
		save(t, d, e)
	}
	if r := run(); !r.Changed {
		t.Error("nothing was withdrawn")
	}
	if _, ok := read(dead); ok {
		t.Error("what is said no longer is still there")
	}
}
