// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
)

func TestSupportEndsWithNotice(t *testing.T) {
	at := func(s string) time.Time {
		x, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for _, c := range []struct {
		name  string
		s     Support
		now   string
		state State
		days  int
	}{
		{"nobody said", Support{}, "2026-11-25T12:00:00Z", Unknown, 0},
		{"a year left", Support{Until: "2027-11-25"}, "2026-11-25T12:00:00Z", Supported, 365},
		{"sixty days and an hour left", Support{Until: "2027-01-23"}, "2026-11-24T23:00:00Z", Supported, 60},
		{"sixty days left", Support{Until: "2027-01-23"}, "2026-11-25T00:00:00Z", Ending, 60},
		{"the last day", Support{Until: "2026-11-25"}, "2026-11-25T23:59:59Z", Ending, 0},
		{"the day after", Support{Until: "2026-11-25"}, "2026-11-26T00:00:00Z", Ended, 0},
		{"declared dead, whatever was promised", Support{Until: "2030-01-01", Ended: "2026-11-01"}, "2026-11-02T00:00:00Z", Ended, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			state, days, err := c.s.At(at(c.now))
			if err != nil || state != c.state || days != c.days {
				t.Errorf("%s, %d days, %v; want %s, %d", state, days, err, c.state, c.days)
			}
		})
	}
	if _, _, err := (Support{Until: "soon"}).At(time.Now()); fault.CodeOf(err) != "bad_date" {
		t.Errorf("a date that is none: %v", err)
	}
}

func TestNothingIsBuiltForADeadKernel(t *testing.T) {
	e := Entry{Release: "6.1.0-47-cloud-amd64", Support: Support{Ended: "2026-11-01", Reason: "six hundred open CVEs", Instead: "6.1.0-56-cloud-amd64"}}
	err := e.Allow(time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC))
	if fault.CodeOf(err) != "kernel_ended" || !strings.Contains(fault.HintOf(err), "6.1.0-56-cloud-amd64") || !strings.Contains(err.Error(), "six hundred") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	e.Support = Support{}
	if err := e.Allow(time.Now()); err != nil {
		t.Errorf("one of which nobody said anything: %v", err)
	}
}

func TestAddingAgainKeepsWhatWasSaidOfSupport(t *testing.T) {
	dir := t.TempDir()
	e := Entry{Release: "6.1.0-50-cloud-amd64", Distro: "debian-12", BuildID: [20]byte{1}, Support: Support{Until: "2027-06-30"}}
	if err := Save(dir, e); err != nil {
		t.Fatal(err)
	}
	again := e
	again.Support = Support{}
	if err := Save(dir, again); err != nil {
		t.Fatal(err)
	}
	got, err := Load(dir, e.Release)
	if err != nil || got.Support.Until != "2027-06-30" {
		t.Errorf("support %+v, %v", got.Support, err)
	}
	again.BuildID[0] = 2 // another compiled kernel of that name
	if err := Save(dir, again); err != nil {
		t.Fatal(err)
	}
	if got, err = Load(dir, e.Release); err != nil || got.Support != (Support{}) {
		t.Errorf("another kernel build took over the support: %+v, %v", got.Support, err)
	}
}
