// SPDX-License-Identifier: Apache-2.0

package player

import (
	"fmt"
	"strings"
	"testing"
)

// TestWhatALeakIs: numbers as they were measured in small guests.
func TestWhatALeakIs(t *testing.T) {
	for _, c := range []struct {
		name    string
		calls   int
		perSlab int
		objects [3]int
		pages   [3]int
		leak    string
	}{
		{"an object for each call, counted in whole slabs", 100, 42, [3]int{1000, 1084, 1210}, [3]int{}, "cache by 84 and 126"},
		{"a slab for each CPU", 100, 64, [3]int{1000, 1064, 1128}, [3]int{}, ""},
		{"the first round fills what the second uses", 100, 42, [3]int{1000, 1200, 1205}, [3]int{}, ""},
		{"a few", 150, 21, [3]int{1000, 1021, 1063}, [3]int{}, ""},
		{"a page for each call", 150, 42, [3]int{}, [3]int{500, 640, 801}, "pages by 140 and 161"},
		{"pages that come and go", 150, 42, [3]int{}, [3]int{500, 640, 322}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var l leakProbe
			for i := range 3 {
				m, err := readMemory(fmt.Sprintf("== slabs\nslabinfo - version: 2.1\n# name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>\ncache %d 9999 96 %d 1 : tunables 0 0 0\n\n"+
					"== zones\nNode 0, zone DMA32\n  pages free 1\n  pagesets\n    cpu: 0\n              count: 7\n              high:  378\n    cpu: 1\n              count: 3\n"+
					"== memory\nMemTotal: %d kB\nMemFree: 40 kB\nSlab: 400 kB\n", c.objects[i], c.perSlab, 40+400+4*(c.pages[i]+10)))
				if err != nil {
					t.Fatal(err)
				}
				if m.cpus != 2 || m.pages != c.pages[i] {
					t.Fatalf("%+v, want %d pages", m, c.pages[i])
				}
				l.looks = append(l.looks, m)
			}
			_, err := l.compare(c.calls)
			if (err == nil) != (c.leak == "") || err != nil && !strings.Contains(err.Error(), c.leak) {
				t.Errorf("%v, want %q", err, c.leak)
			}
		})
	}
	for _, bad := range []string{"", "== slabs\n== zones\n== memory\n", "== slabs\nx y 1 2 3\n== zones\n== memory\nMemTotal: 1 kB\n",
		"== slabs\nx 1 1 2 3\n== zones\n count: y\n== memory\nMemTotal: 1 kB\n", "== slabs\nx 1 1 2 3\n== zones\n== memory\nMemTotal: y kB\n"} {
		if _, err := readMemory(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
