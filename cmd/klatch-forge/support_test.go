// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/kernel"
)

// Three kernel builds of one series and one of another; the middle one is
// declared dead with what is older.
func TestADeadKernelIsMarkedWithThoseBeforeIt(t *testing.T) {
	dir := dataFolder(t, nil)
	for i, e := range []catalog.Entry{
		{Release: "6.1.0-48-cloud-amd64", Series: "debian-6.1", Version: "6.1.172-1"},
		{Release: "6.1.0-50-cloud-amd64", Series: "debian-6.1", Version: "6.1.176-1"},
		{Release: "6.1.0-54-cloud-amd64", Series: "debian-6.1", Version: "6.1.190-1"},
		{Release: "6.12.107+deb13-cloud-amd64", Series: "debian-6.12", Version: "6.12.107-1"},
	} {
		e.Distro, e.Arch, e.BuildID = "debian-12", kernel.AMD64, kernel.BuildID{byte(i + 1)}
		if err := catalog.Save(dir, e); err != nil {
			t.Fatal(err)
		}
	}
	in := func(args ...string) (string, error) {
		return run(t, append([]string{"--dir", dir, "--quiet"}, args...)...)
	}
	soon := time.Now().Add(30 * 24 * time.Hour).UTC().Format(time.DateOnly)
	if _, err := in("kernel", "support", "--kernel", "6.1.0-54-cloud-amd64", "--until", soon); err != nil {
		t.Fatal(err)
	}
	text, err := in("kernel", "end", "--kernel", "6.1.0-50-cloud-amd64", "--older", "--reason", "too many open CVEs", "--instead", "6.1.0-54-cloud-amd64")
	if err != nil || !strings.Contains(text, "6.1.0-48-cloud-amd64 has ended") || !strings.Contains(text, "6.1.0-50-cloud-amd64 has ended") ||
		strings.Contains(text, "6.1.0-54-cloud-amd64 has ended") || strings.Contains(text, "6.12.107") {
		t.Fatalf("%v: %s", err, text)
	}
	text, listErr := in("kernel", "list", "--ending", "40", "--json")
	var listed struct {
		Version int
		Kernels []struct {
			Release string `json:"release"`
			Support string `json:"support"`
			Until   string `json:"until"`
			Instead string `json:"instead"`
		}
	}
	if err := json.Unmarshal([]byte(text), &listed); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	got := map[string]string{}
	for _, k := range listed.Kernels {
		got[k.Release] = k.Support + " " + k.Until + k.Instead
	}
	want := map[string]string{"6.1.0-48-cloud-amd64": "ended 6.1.0-54-cloud-amd64", "6.1.0-50-cloud-amd64": "ended 6.1.0-54-cloud-amd64",
		"6.1.0-54-cloud-amd64": "ending " + soon}
	if len(got) != len(want) {
		t.Errorf("forecast %v", got)
	}
	for r, w := range want {
		if got[r] != w {
			t.Errorf("%s: %q, want %q", r, got[r], w)
		}
	}
	if listErr == nil || listErr.Error() != "exit status 4" {
		t.Errorf("somebody must act: %v", listErr)
	}
	for release, want := range map[string]string{"6.1.0-48-cloud-amd64": "declared dead", "6.1.0-50-cloud-amd64": "with all kernels up to 6.1.0-50-cloud-amd64 (too many open CVEs)",
		"6.1.0-54-cloud-amd64": "supported only until " + soon, "6.12.107+deb13-cloud-amd64": "there is no notice"} {
		if text, err := in("kernel", "notice", "--kernel", release); err != nil || !strings.Contains(text, want) ||
			strings.Contains(text, "dead") != slices.Contains([]string{"6.1.0-48-cloud-amd64", "6.1.0-50-cloud-amd64"}, release) {
			t.Errorf("what machines of %s are told: %v: %s", release, err, text)
		}
	}
	if _, err := in("build", "--kernel", "6.1.0-50-cloud-amd64"); fault.CodeOf(err) != "kernel_ended" || !strings.Contains(fault.HintOf(err), "6.1.0-54-cloud-amd64") {
		t.Errorf("build for a dead kernel: %v, hint %q", err, fault.HintOf(err))
	}
	text, err = in("build", "--series", "debian-6.1", "--json")
	if err == nil || !strings.Contains(text, `"6.1.0-48-cloud-amd64"`) || strings.Count(text, `"result":`)+strings.Count(text, `"result": "`) == 0 {
		t.Errorf("build of a series: %v: %s", err, text)
	}
	if _, err := in("build", "--series", "debian-5.10"); fault.CodeOf(err) != "no_kernel" {
		t.Errorf("a series without kernels: %v", err)
	}
	if _, err := in("kernel", "support", "--kernel", "6.1.0-54-cloud-amd64", "--until", "soon"); fault.CodeOf(err) != "bad_date" {
		t.Errorf("a date that is none: %v", err)
	}
	if _, err := in("kernel", "support", "--kernel", "6.1.0-99-cloud-amd64", "--until", soon); fault.CodeOf(err) != "no_kernel" {
		t.Errorf("a kernel that is not there: %v", err)
	}
}
