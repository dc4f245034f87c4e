// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEveryCaseHasATestOrAReason: the catalog has as many cases as it was
// given, each once, and the tests that it names are in the sources.
func TestEveryCaseHasATestOrAReason(t *testing.T) {
	cases, err := parseCatalog(catalogText)
	if err != nil {
		t.Fatal(err)
	}
	seen, n := map[string]bool{}, map[string]int{}
	for _, c := range cases {
		if n[c.group]++; seen[c.group+c.name] {
			t.Errorf("case %s %s is listed twice", c.group, c.name)
		}
		seen[c.group+c.name] = true
		if c.why != "" {
			if len(strings.Fields(c.why)) < 4 {
				t.Errorf("case %s %s: %q is no reason", c.group, c.name, c.why)
			}
			continue
		}
		if !inSources(t, c) {
			t.Errorf("case %s %s: no test of %s says %q", c.group, c.name, c.pkg, c.test)
		}
	}
	for _, g := range groups {
		if n[g.letter] != g.cases {
			t.Errorf("group %s: %d cases, the catalog has %d", g.letter, n[g.letter], g.cases)
		}
	}
}

// inSources looks for the test's own words: a literal, perhaps after the
// group's letter, or a function. Attacks of group A are data of a package.
func inSources(t *testing.T, c attackCase) bool {
	t.Helper()
	last := c.test[strings.LastIndexByte(c.test, '/')+1:]
	if strings.HasPrefix(c.test, "Test") {
		last, _, _ = strings.Cut(c.test, "/")
	}
	for _, pattern := range []string{filepath.Join(c.pkg, "*_test.go"), "internal/testkit/evidencesim/*.go"} {
		files, err := filepath.Glob(filepath.Join("../..", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			s := string(b)
			if strings.Contains(s, `"`+last+`"`) || strings.Contains(s, "/"+last+`"`) || strings.Contains(s, "func "+last+"(") {
				return true
			}
			// A name may be put together: "bit flips of " + what.
			if i := strings.LastIndexByte(last, ' '); i > 0 && strings.Contains(s, "/"+last[:i+1]+`"`) {
				return true
			}
		}
	}
	return false
}

func TestCount(t *testing.T) {
	cases := []attackCase{
		{group: "M", name: "one", pkg: "x", test: "a b"},
		{group: "K", name: "two", pkg: "x", test: "TestWhole"},
		{group: "K", name: "three", why: "because of that"},
	}
	good := map[string]string{"klatch/x TestAttack/M": "pass", "klatch/x TestAttack/M/a_b": "pass", "klatch/x TestWhole": "pass",
		"klatch/y TestSome/Attack/K/c/deep": "pass", "klatch/y TestSome/Attack/K/c": "pass", "klatch/y TestAttacks/K/no": "fail"}
	r := count(cases, good, "")
	if len(r.problems) != 0 || r.attacks["M"] != 1 || r.attacks["K"] != 1 || r.passed["K"] != 1 {
		t.Errorf("%+v", r)
	}
	said, err := parseTable(r.markdown())
	if err != nil || said["M"] != 1 || said["V"] != 0 || len(said) != len(groups) {
		t.Errorf("read back: %v, %v", said, err)
	}
	r = count(cases, map[string]string{"klatch/x TestAttack/M/a_b": "pass"}, "K")
	if said, err := parseTable(r.markdown()); err != nil || len(r.problems) != 0 || said["K"] != 1 {
		t.Errorf("a group that did not run here: %v, %q, %v", said, r.problems, err)
	}
	for name, change := range map[string]func(map[string]string){
		"a test that was accepted": func(m map[string]string) { m["klatch/y TestSome/Attack/K/c/deep"] = "fail" },
		"a case's test is gone":    func(m map[string]string) { delete(m, "klatch/x TestWhole") },
		"a case's test is skipped": func(m map[string]string) { m["klatch/x TestWhole"] = "skip" },
	} {
		got := map[string]string{}
		for k, v := range good {
			got[k] = v
		}
		change(got)
		if r := count(cases, got, ""); len(r.problems) != 1 {
			t.Errorf("%s: %q", name, r.problems)
		}
	}
}

func TestCheckComparesWithTheDocument(t *testing.T) {
	dir := t.TempDir()
	doc, results := filepath.Join(dir, "doc.md"), filepath.Join(dir, "r.json")
	if err := os.WriteFile(results, []byte(`{"klatch/x TestAttack/M/a":"pass"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(doc, []byte("| M | metadata | 44 | 44 | 2 | 2 | 0 |\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run("", doc, "", []string{results})
	if err == nil || !strings.Contains(err.Error(), "group M: 1 attacks ran") || !strings.Contains(err.Error(), "no row for group K") {
		t.Errorf("got %v", err)
	}
	if err := run(doc, "", "", []string{results}); err == nil || !strings.Contains(err.Error(), "nothing is written") {
		t.Errorf("written over holes: %v", err)
	}
}
