// SPDX-License-Identifier: Apache-2.0

package web_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/server/blob/fsblob"
	"klatch/internal/server/repo"
	"klatch/internal/server/store"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/web"
	"klatch/internal/testkit"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/wire"
)

// fleetOf makes a page over a small fleet in every mood.
func fleetOf(t *testing.T, now time.Time, full bool) *web.Pages {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	p := pubsim.New(t, "acme-livepatch", now)
	r := repo.New(fsblob.New(t.TempDir()), filepath.Join(t.TempDir(), "upstream"), p.Anchor, slog.New(slog.DiscardHandler))
	if full {
		fill(t, db, p, now)
		if _, err := r.Sync(t.Context(), repo.Source{BaseURL: p.Serve(), Client: http.DefaultClient}, now); err != nil {
			t.Fatal(err)
		}
	}
	return &web.Pages{Machines: db, Catalog: r.Catalog, Now: func() time.Time { return now }, Version: "0.1.0"}
}

func fill(t *testing.T, db store.Machines, p *pubsim.Publisher, now time.Time) {
	t.Helper()
	k56, k55 := pubsim.Kernel("6.1.0-56-cloud-amd64", 7), pubsim.Kernel("6.1.0-55-cloud-amd64", 9)
	one, two := []cve.ID{"CVE-2026-52928"}, []cve.ID{"CVE-2026-52928", "CVE-2026-43011"}
	p.Release(now, k56, 1, one...)
	p.Release(now, k56, 2, two...)
	p.Release(now, k55, 4, "CVE-2026-52928", "CVE-2026-43011", "CVE-2026-40102", "CVE-2026-40417", "CVE-2026-41881", "CVE-2026-46331", "CVE-2026-47200")
	fixes := func(ids []cve.ID) (list []livepatch.Fix) {
		for i, id := range ids {
			f := livepatch.Fix{CVE: id, Check: livepatch.Passed}
			if i == 1 {
				f.Check = livepatch.Unchecked
			}
			list = append(list, f)
		}
		return list
	}
	for i, m := range []struct {
		host  string
		k     kernel.Build
		seen  time.Duration
		newer kernel.Release
		state wire.State
	}{
		{"web-01.example.org", k56, 40 * time.Second, "", wire.State{State: "confirmed", Reason: "live_patched", Text: "livepatch 2 with 2 fixes", NextStep: "none", Sequence: 2, Fixes: fixes(two), Advice: "none"}},
		{"web-02.example.org", k56, 12 * time.Minute, "6.1.0-57-cloud-amd64", wire.State{State: "confirmed", Reason: "live_patched", Text: "livepatch 1 with 1 fix", NextStep: "none", Sequence: 1, Fixes: fixes(one), Advice: "advised", Reasons: []fault.Code{"newer_kernel_installed", "livepatch_loaded"}}},
		{"db-01.example.org", k56, 3 * time.Minute, "", wire.State{State: "stalled", Reason: "blocking_task", Text: `livepatch 2: task 4711 "postgres" sleeps in a function that is replaced; the transition was canceled`, NextStep: "stop or restart the task that is named, then: klatch retry", Sequence: 1, Fixes: fixes(one), Advice: "none"}},
		{"build-07.example.org", k55, 20 * time.Second, "", wire.State{State: "transitioning", Reason: "transitioning", Text: "livepatch 4: the kernel moves its tasks to the new code since 3s", NextStep: "none; wait, or see who is in the way: klatch blockers", Sequence: 0, Advice: "none"}},
		{"edge-03.example.org", k55, 30 * time.Hour, "", wire.State{State: "confirmed", Reason: "live_patched", Text: "livepatch 4 with 7 fixes", NextStep: "none", Sequence: 4, Fixes: fixes([]cve.ID{"CVE-2026-52928", "CVE-2026-43011", "CVE-2026-40102", "CVE-2026-40417", "CVE-2026-41881", "CVE-2026-46331", "CVE-2026-47200"}), Advice: "none"}},
		{"lab-<script>alert(1)</script>", pubsim.Kernel("6.12.0-3-amd64", 30), 5 * time.Minute, "", wire.State{State: "no_livepatch", Reason: "no_livepatch", Text: "no livepatch is published for kernel 6.12.0-3-amd64", NextStep: "none; or boot a kernel that has one", Advice: "required", Reasons: []fault.Code{"suspect"}}},
	} {
		s := store.Sighting{
			MachineID: fmt.Sprintf("mch_01kd%022d", i), Tier: "stable", Seen: now.Add(-m.seen), StateAt: now.Add(-m.seen), State: m.state,
			Facts: wire.Facts{Hostname: m.host, Kernel: m.k, Lockdown: "none", Enforced: "no", Version: "0.1.0", Newer: m.newer},
		}
		if i == 1 {
			s.Tier = "canary"
		}
		if err := db.Seen(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
}

func serve(t *testing.T, p *web.Pages) string {
	t.Helper()
	mux := http.NewServeMux()
	for path, h := range map[string]func(http.ResponseWriter, *http.Request) error{"/": p.Index, "/style.css": p.Style} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				t.Error(err)
			}
		})
	}
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL
}

// chromium runs the browser once, without a network of its own wishes.
func chromium(t *testing.T, address string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	args = append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--user-data-dir=" + t.TempDir()}, args...)
	out, err := exec.CommandContext(ctx, "chromium", append(args, address)...).Output()
	if err != nil {
		t.Fatalf("chromium: %v", err)
	}
	return string(out)
}

// screenshots says where to keep pictures, for people; empty: nowhere.
const screenshots = "KLATCH_SCREENSHOTS"

func TestPageInABrowser(t *testing.T) {
	testkit.Need(t, "chromium")
	now := time.Date(2026, 11, 22, 14, 3, 9, 0, time.UTC)
	dir := os.Getenv(screenshots)
	if dir == "" {
		dir = t.TempDir()
	}
	full, empty := serve(t, fleetOf(t, now, true)), serve(t, fleetOf(t, now, false))
	dom := chromium(t, full, "--dump-dom")
	for _, want := range []string{
		"<strong>6</strong> machines", "<strong>4</strong> live patched", "<strong>2</strong> need a person", "<strong>1</strong> silent",
		"<strong>7</strong> CVEs fixed live", "web-01.example.org", "build 0718293a4b5c", "CVE-2026-52928", `unchecked</span>`,
		"stop or restart the task that is named, then: klatch retry", "30 h ago, silent", "wait, or see who is in the way", "2026-11-21 08:03:09 UTC", "newest: 2",
		"newer kernel installed, livepatch loaded", "superseded", "lab-&lt;script&gt;",
	} {
		if !strings.Contains(dom, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Index(dom, "db-01") > strings.Index(dom, "web-01") {
		t.Error("the machine that needs a person is not on top")
	}
	for _, want := range []string{"No machine is enrolled yet.", "klatch-fleet token create", "klatch-server sync --from"} {
		if dom := chromium(t, empty, "--dump-dom"); !strings.Contains(dom, want) {
			t.Errorf("the empty page lacks %q", want)
		}
	}
	for name, shot := range map[string]struct {
		address string
		args    []string
	}{
		"wide":   {full, []string{"--window-size=1400,1250"}},
		"tablet": {full, []string{"--window-size=1000,1300"}},
		"phone":  {full, []string{"--window-size=500,1600"}}, // 500 is the narrowest window that headless Chromium makes
		"dark":   {full, []string{"--window-size=1400,1100", "--force-dark-mode", "--blink-settings=preferredColorScheme=0"}},
		"empty":  {empty, []string{"--window-size=1000,700"}},
	} {
		file := filepath.Join(dir, name+".png")
		chromium(t, shot.address, append(shot.args, "--screenshot="+file)...)
		if st, err := os.Stat(file); err != nil || st.Size() < 5000 {
			t.Errorf("%s: no picture: %v", name, err)
		}
	}
}

func TestPageWithoutABrowser(t *testing.T) {
	now := time.Date(2026, 11, 22, 14, 3, 9, 0, time.UTC)
	p := fleetOf(t, now, true)
	w := httptest.NewRecorder()
	if err := p.Index(w, httptest.NewRequest(http.MethodGet, "/", nil)); err != nil {
		t.Fatal(err)
	}
	csp := w.Header().Get("Content-Security-Policy")
	if !strings.Contains(csp, "default-src 'none'") || strings.Contains(w.Body.String(), "<script") {
		t.Errorf("policy %q", csp)
	}
	p.Now = func() time.Time { return now.Add(49 * time.Hour) }
	w = httptest.NewRecorder()
	if err := p.Index(w, httptest.NewRequest(http.MethodGet, "/", nil)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(w.Body.String(), "metadata expired") {
		t.Error("expired metadata is not shown")
	}
}
