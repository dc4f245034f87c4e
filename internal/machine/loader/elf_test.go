// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/testkit/klpfake"
)

// TestRealModules reads modules of real kernels, if a folder with some is
// named in KLATCH_MODULES, and compares with debug/elf.
func TestRealModules(t *testing.T) {
	dir := os.Getenv("KLATCH_MODULES")
	if dir == "" {
		t.Skip("need KLATCH_MODULES")
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no modules in %s: %v", dir, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		words, err := readModinfo(b)
		if err != nil {
			t.Errorf("%s: %v", f, err)
			continue
		}
		compareWithStandard(t, b, words)
	}
	t.Logf("%d modules", len(files))
}

func compareWithStandard(t *testing.T, b []byte, words map[string][]string) {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return // it is stricter elsewhere, for example with flags of sections
	}
	i := slices.IndexFunc(f.Sections, func(s *elf.Section) bool { return s.Name == ".modinfo" })
	if i < 0 {
		if len(words) > 0 {
			t.Errorf("words %q without a section .modinfo", words)
		}
		return
	}
	want, err := f.Sections[i].Data()
	if err != nil {
		return
	}
	n := 0
	for w := range strings.SplitSeq(string(want), "\x00") {
		if key, value, ok := strings.Cut(w, "="); ok {
			n++
			if !slices.Contains(words[key], value) {
				t.Errorf("word %q is missing", w)
			}
		}
	}
	for _, v := range words {
		n -= len(v)
	}
	if n != 0 {
		t.Errorf("%d words too many or too few", n)
	}
}

// FuzzReadModinfo must refuse with the right kind or agree with debug/elf.
func FuzzReadModinfo(f *testing.F) {
	b := kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-56-cloud-amd64", ID: kernel.BuildID{1}}
	good := klpfake.Module(klpfake.Words(b, 3))
	f.Add(good)
	f.Add(good[:100])
	f.Add(klpfake.ELF())
	f.Add(klpfake.ELF(klpfake.Section{Name: ".modinfo", Kind: 8, Body: []byte("name=x\x00")}))
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, in []byte) {
		words, err := readModinfo(in)
		if err != nil {
			if fault.KindOf(err) != fault.Untrusted || fault.CodeOf(err) != "module_elf" {
				t.Errorf("refused as %v", err)
			}
			return
		}
		compareWithStandard(t, in, words)
	})
}
