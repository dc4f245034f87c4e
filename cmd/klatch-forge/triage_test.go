// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/trust"
)

// dataFolder makes a publisher's data folder with some files.
func dataFolder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if _, err := datadir.Make(dir, datadir.Policy{Publisher: "klatch-test", Profile: trust.Lab}); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := root()
	var stdout bytes.Buffer
	c.SetOut(&stdout)
	c.SetErr(new(bytes.Buffer))
	c.SetArgs(args)
	c.SilenceErrors, c.SilenceUsage = true, true
	err := c.ExecuteContext(t.Context())
	return stdout.String(), err
}

func TestFeedsAreImportedAndDecisionsLinted(t *testing.T) {
	from := filepath.Join(t.TempDir(), "debian.csv")
	if err := os.WriteFile(from, []byte("CVE-2026-0001,high\nCVE-2026-0002,soon\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := dataFolder(t, nil)
	if text, err := run(t, "--dir", dir, "feed", "sync", "--from", from, "--date", "2026-08-21"); err != nil ||
		!strings.Contains(text, "records   1, kept aside or in part: 1\n") || !strings.Contains(text, `CVE-2026-0002: priority "soon" is unknown`) {
		t.Errorf("sync: %v\n%s", err, text)
	}
	if text, err := run(t, "--dir", dir, "feed", "list", "--json"); err != nil || !strings.Contains(text, `"date": "2026-08-21"`) {
		t.Errorf("list: %v\n%s", err, text)
	}
	if text, err := run(t, "--dir", dir, "triage", "lint"); err != nil || text != "0 decisions, 0 bad files\n" {
		t.Errorf("lint: %v\n%s", err, text)
	}
	bad := dataFolder(t, map[string]string{"cve/2026/CVE-2026-0001.yaml": "cve: CVE-2026-0001\nscore: 9\n"})
	if text, err := run(t, "--dir", bad, "triage", "lint"); err == nil || !strings.Contains(text, "cve/2026/CVE-2026-0001.yaml: ") {
		t.Errorf("lint of a bad decision: %v\n%s", err, text)
	}
	for name, c := range map[string]struct {
		args []string
		want fault.Code
	}{
		"no feed":           {[]string{"--dir", dataFolder(t, nil), "triage", "--kernel", "6.1.0-50-cloud-amd64"}, "no_feed"},
		"a bad decision":    {[]string{"--dir", bad, "triage", "--kernel", "6.1.0-50-cloud-amd64", "--feed", from}, "bad_review"},
		"an unknown kernel": {[]string{"--dir", dir, "triage", "--kernel", "6.1.0-50-cloud-amd64", "--feed", from}, "no_kernel"},
		"an unknown policy": {[]string{"--dir", dir, "triage", "--kernel", "6.1.0-50-cloud-amd64", "--policy", "all"}, "bad_policy"},
	} {
		if _, err := run(t, c.args...); fault.CodeOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}
