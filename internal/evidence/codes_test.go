// SPDX-License-Identifier: Apache-2.0

package evidence_test

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"klatch/internal/evidence"
	"klatch/internal/testkit/evidencesim"
)

var update = flag.Bool("update", false, "write the generated table")

func TestCodesAreDocumented(t *testing.T) {
	const file, begin, end = "../../docs/reference/evidence.md", "-run TestCodesAreDocumented -args -update` -->\n", "<!-- end of codes -->"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(b), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the codes", file)
	}
	want := before + begin + "\n" + evidence.Document() + "\n" + end + after
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if string(b) != want {
		t.Errorf("%s is not what the catalog says; run with -args -update", file)
	}
}

// TestEveryCodeHasAnAttack: a code that nothing triggers is a promise to
// nobody, and one that is used must be in the catalog.
func TestEveryCodeHasAnAttack(t *testing.T) {
	attacked := map[string]bool{}
	for _, a := range evidencesim.Attacks {
		attacked[string(a.Code)] = true
	}
	published, err := os.ReadFile("../../cmd/klatch-forge/evidence_test.go")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, r := range evidence.Catalog {
		known[string(r.Code)] = true
		if !attacked[string(r.Code)] && !strings.Contains(string(published), `", "`+string(r.Code)+`", func(`) {
			t.Errorf("no attack of group A has code %s", r.Code)
		}
		if r.Rule == "" || r.Next == "" {
			t.Errorf("code %s has no rule or no next step", r.Code)
		}
	}
	used := regexp.MustCompile(`(?:\b[rR]efuse\(|code = |fault\.Code\()"([a-z_]+)"`)
	for _, pattern := range []string{"*.go", "../audit/*.go", "../attest/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range used.FindAllStringSubmatch(string(b), -1) {
				if !known[m[1]] {
					t.Errorf("%s uses code %s, which is not in the catalog", f, m[1])
				}
			}
		}
	}
}
