// SPDX-License-Identifier: Apache-2.0

package cve_test

import (
	"testing"

	"klatch/internal/cve"
)

func version(t *testing.T, s string) cve.Version {
	t.Helper()
	v, err := cve.ParseVersion(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVersionsOrderAsTheKernelCounts(t *testing.T) {
	order := []string{"2.4.37", "2.6.9", "2.6.32", "2.6.32.5", "2.6.32.10", "2.6.33", "3.0", "5.15", "5.15.2", "6.1-rc2", "6.1-rc10", "6.1", "6.1.9", "6.1.10", "6.2", "6.12"}
	for i := range order {
		if got := version(t, order[i]).String(); got != order[i] {
			t.Errorf("%s prints as %s", order[i], got)
		}
		if i > 0 && version(t, order[i-1]).Compare(version(t, order[i])) >= 0 {
			t.Errorf("%s does not come before %s", order[i-1], order[i])
		}
	}
	if version(t, "2.6.32.5").SameSeries(version(t, "2.6.33")) {
		t.Error("2.6.32 and 2.6.33 are one series: 2.6.N is a series, not a point release")
	}
	for _, s := range []string{"", "6", "6.1.x", "6.01", "6.1.2.3", "6.1.5-rc1", "v6.1", "6.1-rc0", "-1.2", "6.+1", "0.0", "6.1.100000"} {
		if v, err := cve.ParseVersion(s); err == nil {
			t.Errorf("%q is read as %s", s, v)
		}
	}
}

func TestStateOfAVersion(t *testing.T) {
	backported := []string{"5.13:aaaaaaa1:5.15.172:bbbbbbb1", "5.13:aaaaaaa1:6.1.120:bbbbbbb2", "5.13:aaaaaaa1:6.8:bbbbbbb3"}
	for _, c := range []struct {
		name    string
		dyads   []string
		version string
		want    cve.State
	}{
		{"before the flaw", backported, "5.10.200", cve.StateNotPresent},
		{"on a line with a fix, before it", backported, "6.1.119", cve.StateAffected},
		{"on a line with a fix, at it", backported, "6.1.120", cve.StateFixed},
		{"a higher number on another line is no fix", backported, "6.6.200", cve.StateAffected},
		{"mainline with the fix", backported, "6.8", cve.StateFixed},
		{"a later line has what mainline has", backported, "6.12.1", cve.StateFixed},
		{"the flaw came with a point release of this line", []string{"6.1.50:aaaaaaa1:6.1.60:bbbbbbb1"}, "6.1.55", cve.StateAffected},
		{"the same, before it", []string{"6.1.50:aaaaaaa1:6.1.60:bbbbbbb1"}, "6.1.49", cve.StateNotPresent},
		{"the flaw came with a point release of another line", []string{"5.15.50:aaaaaaa1:5.15.60:bbbbbbb1"}, "6.1.55", cve.StateNotPresent},
		{"never fixed", []string{"5.13:aaaaaaa1:0:0"}, "6.1.55", cve.StateAffected},
		{"since ever", []string{"0:0:6.1.157:bbbbbbb1", "0:0:6.18:bbbbbbb2"}, "6.1.156", cve.StateAffected},
		{"2.6.N is a mainline series", []string{"2.6.26:aaaaaaa1:6.1.10:bbbbbbb1", "2.6.26:aaaaaaa1:6.2:bbbbbbb2"}, "6.1.9", cve.StateAffected},
		{"fixed on another line only, mainline silent", []string{"5.13:aaaaaaa1:5.15.172:bbbbbbb1"}, "6.1.1", cve.StateUnknown},
		{"two origins, one of them not fixed", []string{"5.13:aaaaaaa1:6.1.20:bbbbbbb1", "6.1.10:aaaaaaa2:6.1.90:bbbbbbb2"}, "6.1.50", cve.StateAffected},
		{"two origins, the other not here yet", []string{"5.13:aaaaaaa1:6.1.20:bbbbbbb1", "6.1.60:aaaaaaa2:6.1.90:bbbbbbb2"}, "6.1.50", cve.StateFixed},
		{"nobody knows", nil, "6.1.50", cve.StateUnknown},
	} {
		var dyads []cve.Dyad
		for _, s := range c.dyads {
			d, err := cve.ParseDyad(s)
			if err != nil {
				t.Fatal(err)
			}
			if d.String() != s {
				t.Errorf("%s prints as %s", s, d)
			}
			dyads = append(dyads, d)
		}
		if got, by := cve.StateAt(dyads, version(t, c.version)); got != c.want {
			t.Errorf("%s: %s is %s by %s, want %s", c.name, c.version, got, by, c.want)
		}
	}
}

func FuzzDyad(f *testing.F) {
	f.Add("2.6.26:c0efaaaa:5.15.172:467daaaa", "6.1.1")
	f.Add("0:0:6.13:a71874379ec8", "2.6.32.1")
	f.Fuzz(func(t *testing.T, text, at string) {
		d, err := cve.ParseDyad(text)
		if err != nil {
			return
		}
		if again, err := cve.ParseDyad(d.String()); err != nil || again != d {
			t.Errorf("%q prints as %q, which is read as %v: %v", text, d, again, err)
		}
		v, err := cve.ParseVersion(at)
		if err != nil {
			return
		}
		if s, _ := cve.StateAt([]cve.Dyad{d}, v); s == cve.StateFixed && d.Fixed.IsZero() {
			t.Errorf("%q: fixed without a fix", text)
		}
	})
}
