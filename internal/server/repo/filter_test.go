// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/server/repo"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

func TestFilters(t *testing.T) {
	places := map[string]livepatch.Place{
		"old":   {Distro: "debian-12", Arch: "amd64", Release: "6.1.0-9-amd64"},
		"cloud": {Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-cloud-amd64"},
		"rt":    {Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-rt-amd64"},
		"arm":   {Distro: "debian-12", Arch: "arm64", Release: "6.1.0-50-cloud-arm64"},
		"new":   {Distro: "debian-13", Arch: "amd64", Release: "6.12.9+deb13-cloud-amd64"},
		"odd":   {Distro: "acme", Arch: "amd64", Release: "6.10.3-acme"},
	}
	for _, tt := range []struct {
		name string
		f    repo.Filter
		want string
	}{
		{"nothing asked, all come", repo.Filter{}, "arm cloud new odd old rt"},
		{"one distribution", repo.Filter{Distros: []string{"debian-12"}}, "arm cloud old rt"},
		{"a pattern of distributions", repo.Filter{Distros: []string{"debian-*"}}, "arm cloud new old rt"},
		{"two distributions", repo.Filter{Distros: []string{"acme", "debian-13"}}, "new odd"},
		{"an architecture", repo.Filter{Arches: []string{"arm64"}}, "arm"},
		{"a series is not the beginning of another", repo.Filter{Series: []string{"6.1"}}, "arm cloud old rt"},
		{"numbers are compared as numbers", repo.Filter{MinKernels: []string{"6.1.0-10"}}, "arm cloud new odd rt"},
		{"the minimum itself is enough", repo.Filter{MinKernels: []string{"6.1.0-50"}}, "arm cloud new odd rt"},
		{"a minimum for each series", repo.Filter{MinKernels: []string{"6.1.0-51", "6.12.9"}}, "new odd"},
		{"a newer series has its own minimum", repo.Filter{MinKernels: []string{"6.1.0-9", "6.12.10"}}, "arm cloud odd old rt"},
		{"a series below the lowest minimum", repo.Filter{MinKernels: []string{"6.12.1"}}, "new"},
		{"a pattern of kernels", repo.Filter{Kernels: []string{"*-cloud-*"}}, "arm cloud new"},
		{"three together", repo.Filter{Distros: []string{"debian-12"}, Arches: []string{"amd64"}, MinKernels: []string{"6.1.0-40"}}, "cloud rt"},
		{"all five", repo.Filter{Distros: []string{"debian-*"}, Arches: []string{"amd64"}, Series: []string{"6.1", "6.12"}, MinKernels: []string{"6.1.0-40"}, Kernels: []string{"*-cloud-amd64"}}, "cloud new"},
		{"nothing fits", repo.Filter{Distros: []string{"debian-13"}, Series: []string{"6.1"}}, ""},
	} {
		if err := (repo.Rules{Filter: tt.f}).Validate(); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		var got []string
		for _, name := range slices.Sorted(maps.Keys(places)) {
			if tt.f.Match(places[name]) {
				got = append(got, name)
			}
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, s, tt.want)
		}
	}
}

func TestAFilterThatMeansNothingIsRefused(t *testing.T) {
	for name, r := range map[string]repo.Rules{
		"an empty value":         {Filter: repo.Filter{Distros: []string{""}}},
		"a broken pattern":       {Filter: repo.Filter{Kernels: []string{"[6"}}},
		"a path":                 {Filter: repo.Filter{Kernels: []string{"a/b"}}},
		"a series of one number": {Filter: repo.Filter{Series: []string{"6"}}},
		"a series of three":      {Filter: repo.Filter{Series: []string{"6.1.0"}}},
		"a minimum of no number": {Filter: repo.Filter{MinKernels: []string{"trixie"}}},
		"too many values":        {Filter: repo.Filter{Arches: make([]string, 101)}},
		"an age below zero":      {MinAge: -time.Hour},
		"an age over metadata's": {MinAge: 100 * 24 * time.Hour},
	} {
		if err := r.Validate(); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAFilteredMirrorIsWholeForWhatItHas: all metadata is here, only matching
// files are; what is left out is named, not offered and no problem, also after
// a restart; and with a wider filter it comes.
func TestAFilteredMirrorIsWholeForWhatItHas(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	one := p.Release(start, stock, 1, "CVE-2026-0001")
	two := p.Release(start, nearby, 1, "CVE-2026-0001")
	p.Publish(start, tufrepo.Target{Path: strings.TrimSuffix(two, ".lpb") + ".evidence.json", Content: []byte("{}")},
		tufrepo.Target{Path: "policy/evidence.1.json", Content: []byte("{}")})
	m := newMirror(t, p)
	m.rules.Filter.Kernels = []string{"6.1.0-50-*"}
	r, err := m.sync(start)
	if err != nil || !r.Changed || r.Copied != 2 || r.Livepatches != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	for range 2 {
		c := m.Catalog()
		if m.targets() != one || len(c.Problems) != 0 || len(c.LeftOut) != 1 || c.LeftOut[0].Target != two || c.LeftOut[0].Why != repo.ByFilter ||
			c.LeftOut[0].Kernel != nearby || c.LeftOut[0].Sequence != 1 || m.Changed(t.Context()) {
			t.Errorf("%+v", c)
		}
		if why := fleet.Missing(c.Absent(), nearby, 0); why != "filter" {
			t.Errorf("a machine of the neighbor kernel hears %q", why)
		}
		if why := fleet.Missing(c.Absent(), stock, 0) + fleet.Missing(c.Absent(), nearby, 1); why != "" {
			t.Errorf("a machine that lacks nothing hears %q", why)
		}
		m.reopen()
		if err := m.Load(t.Context(), start); err != nil {
			t.Fatal(err)
		}
	}
	if files := m.files("targets"); len(files) != 2 {
		t.Errorf("on disk: %q", files)
	}
	s, err := m.machine(start)
	if err != nil || len(s.Targets()) != 4 {
		t.Errorf("a machine sees %v, %v", s, err)
	}
	if r, err := m.sync(start); err != nil || r.Changed || len(r.LeftOut) != 1 {
		t.Errorf("again: %+v, %v", r, err)
	}

	m.rules.Filter = repo.Filter{}
	if r, err := m.sync(start); err != nil || !r.Changed || r.Copied != 2 || len(m.Catalog().LeftOut) != 0 || len(m.Catalog().Entries) != 2 {
		t.Errorf("a wider filter: %+v, %v", r, err)
	}
	// What was copied before and is now filtered away is not offered any more.
	m.rules.Filter.Kernels = []string{"6.1.0-51-*"}
	if r, err := m.sync(start); err != nil || m.targets() != two {
		t.Errorf("another filter: %+v, %v", r, err)
	}
}

func (m *mirror) files(below string) []string {
	m.t.Helper()
	var names []string
	for _, depth := range []string{"*", "*/*", "*/*/*", "*/*/*/*"} {
		found, err := filepath.Glob(filepath.Join(m.dir, below, depth))
		if err != nil {
			m.t.Fatal(err)
		}
		for _, f := range found {
			if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() {
				names = append(names, f)
			}
		}
	}
	return names
}

// recall takes a livepatch back.
func recall(t *testing.T, p *pubsim.Publisher, now time.Time, k kernel.Build, s livepatch.Sequence) {
	t.Helper()
	r := livepatch.Recalls{Format: livepatch.RecallsFormat, Version: 1, Issued: now, Entries: []livepatch.Recall{{Kernel: k.ID, Sequence: s, Reason: "it hangs"}}}
	signed, err := trustsign.Recalls(r, p.Note)
	if err != nil {
		t.Fatal(err)
	}
	p.Publish(now, tufrepo.Target{Path: livepatch.RecallsPath(1), Content: signed})
}

// TestALivepatchWaitsUntilItIsOldEnough: by the time in the signed list, not by
// that of files; the recall that comes meanwhile does not wait.
func TestALivepatchWaitsUntilItIsOldEnough(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	one := p.Release(start.Add(-72*time.Hour), stock, 1, "CVE-2026-0001")
	bundle, b := p.Bundle(nearby, 1)
	p.Publish(start, tufrepo.Target{Path: bundle.TargetPath(), Content: b.Encode()}) // its list tells no time
	two := p.Release(start, stock, 2, "CVE-2026-0001", "CVE-2026-0002")
	m := newMirror(t, p)
	m.rules.MinAge = 24 * time.Hour
	whys := func() string {
		var list []string
		for _, l := range m.Catalog().LeftOut {
			list = append(list, fmt.Sprint(l.Sequence, l.Why, " ", l.Until.Format(time.RFC3339)))
		}
		return strings.Join(list, "; ")
	}
	if _, err := m.sync(start.Add(time.Hour)); err != nil || m.targets() != one {
		t.Fatalf("%s, %v", m.targets(), err)
	}
	if got, want := whys(), "2age 2026-11-02T12:00:00Z; 1age_unknown 0001-01-01T00:00:00Z"; got != want {
		t.Errorf("left out %q, want %q", got, want)
	}
	if why := fleet.Missing(m.Catalog().Absent(), stock, 1); why != "age" {
		t.Errorf("a machine with 1 hears %q", why)
	}
	recall(t, p, start.Add(2*time.Hour), stock, 1)
	r, err := m.sync(start.Add(2 * time.Hour))
	if err != nil || m.targets() != "" || r.Recalls != 1 || m.Catalog().Recalls != 1 {
		t.Errorf("the recall waits: %+v, %v", r, err)
	}
	// Nothing is signed meanwhile; only time passes.
	if r, err := m.sync(start.Add(23 * time.Hour)); err != nil || r.Changed {
		t.Errorf("an hour early: %+v, %v", r, err)
	}
	if r, err := m.sync(start.Add(24 * time.Hour)); err != nil || !r.Changed || m.targets() != two {
		t.Errorf("old enough: %+v, %v", r, err)
	}
	m.reopen()
	if err := m.Load(t.Context(), start.Add(24*time.Hour)); err != nil || m.targets() != two || len(m.Catalog().LeftOut) != 1 {
		t.Errorf("after a restart: %s, %v", m.targets(), err)
	}
}

// TestEvidenceAndProofGoWithTheirLivepatch: they are as old as it is.
func TestEvidenceAndProofGoWithTheirLivepatch(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	one := p.Release(start, stock, 1)
	stem := strings.TrimSuffix(one, ".lpb")
	p.Publish(start, tufrepo.Target{Path: stem + ".evidence.json", Content: []byte("{}")}, tufrepo.Target{Path: stem + ".tlog-proof", Content: []byte("p")})
	m := newMirror(t, p)
	m.rules.MinAge = time.Hour
	if r, err := m.sync(start); err != nil || r.Copied != 0 || len(m.files("targets")) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := m.sync(start.Add(time.Hour)); err != nil || r.Copied != 3 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestAMirrorOfAFilteredMirror: what the one above leaves out is no problem
// below, the recall goes through, and what the one above takes later arrives.
func TestAMirrorOfAFilteredMirror(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	p.Release(start, stock, 1)
	two := p.Release(start, nearby, 1)
	above, below := newMirror(t, p), newMirror(t, p)
	above.rules.Filter.Kernels = []string{"6.1.0-50-*"}
	below.upstream = above.serve()
	both := func(now time.Time) {
		t.Helper()
		for _, m := range []*mirror{above, below} {
			if _, err := m.sync(now); err != nil {
				t.Fatal(err)
			}
		}
	}
	both(start)
	if c := below.Catalog(); len(c.Entries) != 1 || len(c.LeftOut) != 1 || c.LeftOut[0].Target != two || c.LeftOut[0].Why != repo.ByUpstream {
		t.Errorf("%+v", c)
	}
	recall(t, p, start.Add(time.Minute), stock, 1)
	both(start.Add(time.Minute))
	if c := below.Catalog(); len(c.Entries) != 0 || c.Recalls != 1 {
		t.Errorf("the recall did not come through: %+v", c)
	}
	above.rules.Filter = repo.Filter{}
	both(start.Add(2 * time.Minute))
	if below.targets() != two {
		t.Errorf("what the one above has now: %s", below.targets())
	}
	// A file that the one above lost is a problem, because it does not say so.
	for _, f := range above.files("targets") {
		if strings.Contains(f, "6.1.0-51") {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	third := newMirror(t, p)
	third.upstream = below.upstream
	if _, err := third.sync(start.Add(3 * time.Minute)); fault.CodeOf(err) != "sync_broken" {
		t.Errorf("a lost file: %v", err)
	}
	// The one below has it, and keeps it when the one above drops it.
	above.rules.Filter.Kernels = []string{"6.1.0-50-*"}
	both(start.Add(4 * time.Minute))
	if below.targets() != two {
		t.Errorf("what is here was dropped: %s", below.targets())
	}
}
