// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
)

func console(b *testing.B, name string) []byte {
	b.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata/console", name+".log"))
	if err != nil {
		b.Fatal(err)
	}
	return raw
}

// BenchmarkScanConsole: a clean boot, one with an oops, and as much as a rig
// hands over at most (16 MiB), once of boots and once of what a hostile program
// may print.
func BenchmarkScanConsole(b *testing.B) {
	clean := lab.CleanConsole(console(b, "clean-boot"))
	for _, bb := range []struct{ name, text string }{
		{"clean-boot", clean},
		{"oops", lab.CleanConsole(console(b, "null"))},
		{"16MiB-of-boots", strings.Repeat(clean, (16<<20)/len(clean))},
		{"16MiB-of-stamps", strings.Repeat("[    1.000000] x", (16<<20)/16)},
		{"16MiB-of-brackets", strings.Repeat("[", 16<<20)},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.SetBytes(int64(len(bb.text)))
			b.ReportAllocs()
			for b.Loop() {
				lab.ScanConsole(bb.text)
			}
		})
	}
}

func BenchmarkCleanConsole(b *testing.B) {
	raw := console(b, "clean-boot")
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		lab.CleanConsole(raw)
	}
}

func BenchmarkJudge(b *testing.B) {
	text := lab.CleanConsole(console(b, "null"))
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if v, _ := lab.Judge(nil, text); v != lab.Fail {
			b.Fatal(v)
		}
	}
}
