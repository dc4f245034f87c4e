// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

func TestSizesAreReadAndPrinted(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "300M": 300 << 20, "6G": 6 << 30, "6g": 6 << 30, "6GiB": 6 << 30, "1500K": 1500 << 10, "17": 17, "2T": 2 << 40} {
		var s size
		if err := s.Set(text); err != nil || int64(s) != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
		var again size
		if err := again.Set(s.String()); err != nil || again != s {
			t.Errorf("%s is printed as %s: %d, %v", text, &s, again, err)
		}
	}
	for _, text := range []string{"", "G", "-1G", "1.5G", "6 G", "6X", "9999999999T", "0x10"} {
		var s size
		if err := s.Set(text); err == nil {
			t.Errorf("%q was read as %d", text, s)
		}
	}
	for _, l := range []buildLimits{{memory: 1 << 20}, {disk: 5}, {timeout: -1}} {
		if _, err := l.sandbox(); err == nil {
			t.Errorf("%+v was accepted", l)
		}
	}
}
