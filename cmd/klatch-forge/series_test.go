// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"klatch/internal/forge/catalog"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/kernel"
)

func TestTheWorstTestOfASeriesCounts(t *testing.T) {
	of := func(v lab.Verdict) tested { return tested{Result: &proof.Result{Verdict: v}} }
	for _, c := range []struct {
		name string
		all  []tested
		want int
	}{
		{"all pass", []tested{of(lab.Pass), of(lab.Pass)}, 0},
		{"one fails", []tested{of(lab.Pass), of(lab.Broken), of(lab.Fail)}, 3},
		{"one is broken", []tested{of(lab.Broken), of(lab.Pass)}, 75},
		{"one cannot be tested", []tested{of(lab.Pass), {Error: "no image"}}, 75},
	} {
		if got := worstTest(c.all); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// TestASeriesIsTestedKernelByKernel: what cannot be tested is no pass, and is
// told for each kernel; one whose support has ended is left out.
func TestASeriesIsTestedKernelByKernel(t *testing.T) {
	dir := dataFolder(t, nil)
	for i, r := range []kernel.Release{"6.1.0-48-cloud-amd64", "6.1.0-50-cloud-amd64", "6.1.0-54-cloud-amd64"} {
		e := catalog.Entry{Release: r, Series: "debian-6.1", Version: "6.1.1" + string(r[6:8]) + "-1", Distro: "debian-12", Arch: kernel.AMD64, BuildID: kernel.BuildID{byte(i + 1)}}
		if err := catalog.Save(dir, e); err != nil {
			t.Fatal(err)
		}
	}
	in := func(args ...string) (string, error) {
		return run(t, append([]string{"--dir", dir, "--quiet"}, args...)...)
	}
	if _, err := in("kernel", "end", "--kernel", "6.1.0-48-cloud-amd64", "--reason", "old"); err != nil {
		t.Fatal(err)
	}
	text, err := in("test", "--series", "debian-6.1")
	if err == nil || err.Error() != "exit status 75" {
		t.Errorf("%v, want exit status 75", err)
	}
	for _, want := range []string{"6.1.0-50-cloud-amd64             not tested: ", "6.1.0-54-cloud-amd64             not tested: ", "6.1.0-48-cloud-amd64             support has ended"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
}
