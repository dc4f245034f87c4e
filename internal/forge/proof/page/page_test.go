// SPDX-License-Identifier: Apache-2.0

package page_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/proof/page"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
)

const oops = "[    5.100000] BUG: kernel NULL pointer dereference, address: 0000000000000008\n[    5.100001] Call Trace:\n[    5.100002]  <TASK>\n[    5.100003]  unix_ioctl+0x12/0x40 [klatch_2]\n[    5.100004]  </TASK>\n"

// report is one of a test in which something of each kind happened.
func report(t *testing.T, verdict lab.Verdict) page.Input {
	t.Helper()
	runs := t.TempDir()
	in := page.Input{RunsDir: runs, Made: "v1", Result: proof.Result{Version: 2, Verdict: verdict, Sequence: 2, Kernel: "6.1.0-54-cloud-amd64",
		ModuleSHA256: strings.Repeat("0123456789abcdef", 4), BuildID: strings.Repeat("89abcdef01", 4),
		Required:      []string{"load-and-disable", "busy-machine", "all/<b>mine"},
		NotApplicable: []proof.NotApplicable{{Name: "late-module", Why: "the livepatch replaces functions of no module"}},
		Fixes:         []livepatch.Fix{{CVE: "CVE-2026-52928", Check: livepatch.Passed}, {CVE: "CVE-2026-93146", Check: livepatch.Unchecked}}},
		Built: build.Result{Module: &build.Module{Bytes: 123456}, Match: match.Report{Checked: 210, Identical: 208},
			Functions: []livepatch.Function{{Object: "vmlinux", Name: "unix_ioctl"}, {Object: "vmlinux", Name: "a_function_with_a_very_long_name_that_no_phone_shows_in_one_line"}, {Object: "ip_gre", Name: "ipgre_tunnel_setup"}}}}
	steps := []player.Step{{Line: 5, Text: "[modules] module load", Skipped: true},
		{Line: 9, Text: "[symbols] symbols", Note: "48000 functions are where the builder's tables say", Seconds: 2.1},
		{Line: 12, Text: "check fixed", Seconds: 0.4}}
	scenario := func(name string, v lab.Verdict, why string, line int, trouble []lab.Trouble) {
		in.Result.Scenarios = append(in.Result.Scenarios, proof.Scenario{Name: name, Verdict: v, Why: why, Line: line, Trouble: trouble, Steps: steps,
			Proves: "On an idle machine the livepatch loads from clean and makes each flaw go away.", Rig: lab.Virtual, Required: true, Run: strings.ReplaceAll(name, "/", "_") + "-0123456789ab",
			Seconds: 31.25, Boot: 4.5, Finished: time.Date(2026, 11, 25, 22, 0, 0, 0, time.UTC)})
	}
	scenario("load-and-disable", lab.Pass, "", 0, nil)
	if verdict == lab.Fail {
		found := lab.ScanConsole("[    5.000000] livepatch: enabling patch 'klatch_2'\n" + oops)
		scenario("busy-machine", lab.Fail, found[0].Title, 12, found)
		dir := filepath.Join(runs, "busy-machine-0123456789ab")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, proof.ConsoleFile), []byte("[    5.000000] livepatch: enabling patch 'klatch_2'\n"+oops), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if verdict != lab.Pass {
		scenario("all/<b>mine", lab.Broken, `the emulator said "<script>alert(1)</script>`+"\x1b[31m", 0, nil)
	}
	return in
}

func TestThePageSaysWhatTheResultSays(t *testing.T) {
	for _, verdict := range []lab.Verdict{lab.Pass, lab.Fail, lab.Broken} {
		t.Run(string(verdict), func(t *testing.T) {
			dir := t.TempDir()
			if err := page.Write(dir, report(t, verdict)); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(page.File(dir))
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			want := []string{"<title>" + string(verdict) + ": livepatch 2", "CVE-2026-52928", "unchecked", "late-module: the livepatch replaces functions of no module",
				"208 of 210", "3 steps", "31.2 s", "2 functions", "48000 functions", "virtual machines"}
			not := []string{"<script", "\x1b", "http:", "https:", "src=", "&lt;nil&gt;", "%!"}
			switch verdict {
			case lab.Pass:
				want, not = append(want, "may be signed", "1 of 2 fixes are unchecked"), append(not, "What went wrong")
			case lab.Fail:
				want = append(want, "The livepatch is to blame", "unix_ioctl&#43;0x12/0x40 [klatch_2]", "At the command <code>check fixed</code>",
					"--replay busy-machine-0123456789ab", "enabling patch &#39;klatch_2&#39;")
				if strings.Index(text, "busy-machine</h3>") > strings.Index(text, "load-and-disable</h3>") {
					want = append(want, "what failed comes first")
				}
			default:
				want = append(want, "no pass", "all/&lt;b&gt;mine", "&lt;script&gt;alert(1)")
			}
			for _, w := range want {
				if !strings.Contains(text, w) {
					t.Errorf("no %q", w)
				}
			}
			for _, n := range not {
				if strings.Contains(text, n) {
					t.Errorf("has %q", n)
				}
			}
		})
	}
}

// TestThePageFitsAPhone opens the page in a browser, as narrow and as wide as
// people have it, and looks that nothing is wider than the window.
func TestThePageFitsAPhone(t *testing.T) {
	testkit.Need(t, "chromium")
	b, err := page.Render(report(t, lab.Fail))
	if err != nil {
		t.Fatal(err)
	}
	// The page itself has no script; this one is the test's.
	measured := strings.Replace(string(b), "</body>", `<script>document.querySelectorAll("details").forEach(d => d.open = true);
		document.body.append("measured " + document.documentElement.scrollWidth + " of " + window.innerWidth)</script></body>`, 1)
	file := filepath.Join(t.TempDir(), "report.html")
	if err := os.WriteFile(file, []byte(measured), 0o644); err != nil {
		t.Fatal(err)
	}
	pictures := os.Getenv("KLATCH_SCREENSHOTS") // a folder, for people
	for _, width := range []int{500, 1200} {    // headless windows are not narrower than 500
		size := "--window-size=" + strconv.Itoa(width) + ",1500"
		m := regexp.MustCompile(`measured (\d+) of (\d+)`).FindStringSubmatch(chromium(t, file, size, "--dump-dom"))
		if m == nil {
			t.Fatal("the browser does not tell how wide it is")
		}
		have, err1 := strconv.Atoi(m[1])
		window, err2 := strconv.Atoi(m[2])
		if err1 != nil || err2 != nil || have > window {
			t.Errorf("%d pixels wide in a window of %d", have, window)
		}
		if pictures == "" {
			continue
		}
		for _, verdict := range []lab.Verdict{lab.Pass, lab.Fail, lab.Broken} {
			dir := t.TempDir()
			if err := page.Write(dir, report(t, verdict)); err != nil {
				t.Fatal(err)
			}
			chromium(t, page.File(dir), size, "--screenshot="+filepath.Join(pictures, fmt.Sprintf("report-%s-%d.png", verdict, width)))
		}
	}
}

// chromium opens a file in the browser.
func chromium(t *testing.T, file string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	args = append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
		"--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars", "--user-data-dir=" + t.TempDir()}, args...)
	out, err := exec.CommandContext(ctx, "chromium", append(args, "file://"+file)...).Output()
	if err != nil {
		t.Fatalf("chromium: %v", err)
	}
	return string(out)
}
