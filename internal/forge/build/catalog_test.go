// SPDX-License-Identifier: Apache-2.0

package build_test

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
)

var update = flag.Bool("update", false, "write the generated document")

func TestCatalogIsDocumented(t *testing.T) {
	const file = "../../../docs/reference/refusals.md"
	if *update {
		if err := os.WriteFile(file, []byte(build.Document()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil || string(have) != build.Document() {
		t.Errorf("%s is not what the catalog says (%v); run with -args -update", file, err)
	}
}

// elsewhere are the codes whose real change is not in the table of
// objbuild/refusals_vm_test.go, with the test that has it.
var elsewhere = map[string]string{
	"landing_pad_gone":     "objbuild TestDebian13, with its near miss: 6.1 tracks no branches",
	"wrong_environment":    "objbuild TestWrongEnvironmentIsRefused too",
	"differ_refused":       "klpbuild: what objtool says without more; create-diff-object's own errors are all told apart",
	"module_name_too_long": "no real change: a name made of the sequence has 17 bytes at most",
	"lib_code":             "klpbuild TestRefusesWhatItCannotDo",
	"not_proved":           "every build of the source driver warns so",
	"inlined":              "the source driver; no case yet",
	"layout_changed":       "objbuild TestLayoutOfTypes",
	"layout_local":         "objbuild TestLayoutOfTypes",
	"layout_meaning":       "objbuild TestLayoutOfTypes",
	"callbacks":            "the source driver; no case yet",
	"callers_replaced":     "objbuild TestEverythingInOneLivepatch, on the running kernel",
	"ambiguous_symbol":     "no real change is known; match TestPositionCountsAsTheKernelDoes has the cases",
}

// TestEveryCodeHasACase reads the table of real changes that trigger a code,
// each with a near miss: a code that nothing triggers is a promise to nobody.
func TestEveryCodeHasACase(t *testing.T) {
	files, err := filepath.Glob("*/*_vm_test.go")
	if err != nil {
		t.Fatal(err)
	}
	table := regexp.MustCompile(`(?m)^\s*\{code: "([a-z_]+)"`)
	named := regexp.MustCompile(`"([a-z]+_[a-z_]+)"`)
	has, hand := map[string]bool{}, map[string]bool{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(f, "source/") { // its suite has a form of its own
			for _, m := range named.FindAllStringSubmatch(string(b), -1) {
				hand[m[1]] = true
			}
		}
		for _, m := range table.FindAllStringSubmatch(string(b), -1) {
			has[m[1]] = true
		}
	}
	if len(has) < 20 {
		t.Fatalf("the tables have only %d codes", len(has))
	}
	for _, r := range build.Catalog {
		if !has[string(r.Code)] && !hand[string(r.Code)] && elsewhere[string(r.Code)] == "" {
			t.Errorf("no real change of a kernel triggers %s: add it to objbuild/refusals_vm_test.go, or say in elsewhere where it is", r.Code)
		}
	}
	for code := range has {
		if !slices.ContainsFunc(build.Catalog, func(r build.Rule) bool { return string(r.Code) == code }) {
			t.Errorf("a case wants %s, which is not in the catalog", code)
		}
	}
}

// TestEveryCodeIsInTheCatalog reads the sources: a refusal outside of the
// catalog would end the builder, and an entry that nobody uses is dead.
func TestEveryCodeIsInTheCatalog(t *testing.T) {
	seen := map[string]int{}
	for _, r := range build.Catalog {
		if seen[string(r.Code)]++; seen[string(r.Code)] > 1 {
			t.Errorf("%s is in the catalog twice", r.Code)
		}
		if r.Rule == "" || r.Hint == "" && r.WayOut == "" {
			t.Errorf("%s says no rule, or nothing to try", r.Code)
		}
	}
	quoted := regexp.MustCompile(`"([a-z_]+)"`)
	refused := regexp.MustCompile(`Refuse\("([a-z_]+)"`)
	used := map[string]bool{}
	files, err := filepath.Glob("*/*.go")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range refused.FindAllStringSubmatch(string(b), -1) {
			if seen[m[1]] == 0 {
				t.Errorf("%s refuses with %s, which is not in the catalog", f, m[1])
			}
		}
		for _, m := range quoted.FindAllStringSubmatch(string(b), -1) {
			used[m[1]] = true
		}
	}
	for _, r := range build.Catalog {
		if !used[string(r.Code)] {
			t.Errorf("no driver uses %s", r.Code)
		}
	}
	if r := build.Refuse("ops_table_changed", "a.c"); r.Code != fault.Code("ops_table_changed") || !strings.Contains(r.Hint, "in a callback") {
		t.Errorf("refusal %+v", r)
	}
}
