// SPDX-License-Identifier: Apache-2.0

package klatch

import (
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	featureRow   = regexp.MustCompile(`(?m)^\| ([A-Z][0-9]+) \|(.*)\|\s*$`)
	backticked   = regexp.MustCompile("`([^`]+)`")
	testName     = regexp.MustCompile(`^((?:Test|Fuzz|Benchmark)[A-Z]\w*)(/.+)?$`)
	makeTarget   = regexp.MustCompile(`^make ([a-z-]+)$`)
	featureState = []string{"works", "partly", "not yet"}
)

// TestFeatures keeps docs/features.md honest: every capability is there once
// and in order, and what is said to work names a test that exists.
func TestFeatures(t *testing.T) {
	var want []string
	for _, part := range []struct {
		letter string
		rows   int
	}{{"A", 18}, {"B", 86}, {"C", 16}, {"D", 15}} {
		for i := range part.rows {
			want = append(want, fmt.Sprintf("%s%d", part.letter, i+1))
		}
	}
	known := testsOfTree(t)
	var got []string
	for _, m := range featureRow.FindAllStringSubmatch(readText(t, "docs/features.md"), -1) {
		got = append(got, m[1])
		for _, v := range featureViolations(m[1], m[2], known) {
			t.Error(v)
		}
	}
	for i, id := range want {
		switch n := countOf(got, id); {
		case n != 1:
			t.Errorf("docs/features.md has %s %d times", id, n)
		case got[min(i, len(got)-1)] != id:
			t.Errorf("docs/features.md: %s is out of order", id)
		}
	}
	for _, id := range got {
		if !slices.Contains(want, id) {
			t.Errorf("docs/features.md has %s, which nobody planned", id)
		}
	}
}

// evidence is what a row may name as its proof.
type evidence struct {
	tests   map[string]bool // function names
	txtar   []string        // paths
	targets []string        // of the Makefile
}

// featureViolations says what is wrong with one row: the capability, the
// state and the proof or what is missing.
func featureViolations(id, row string, known evidence) []string {
	cells := strings.Split(row, " | ")
	if len(cells) != 3 {
		return []string{fmt.Sprintf("%s: want three cells after the id, found %d", id, len(cells))}
	}
	state, proof := strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])
	switch {
	case !slices.Contains(featureState, state):
		return []string{fmt.Sprintf("%s: state %q is none of %q", id, state, featureState)}
	case proof == "":
		return []string{fmt.Sprintf("%s: says neither the test nor what is missing", id)}
	case state != "works":
		return nil
	}
	var bad []string
	proofs := 0
	for _, m := range backticked.FindAllStringSubmatch(proof, -1) {
		name := strings.TrimSpace(m[1])
		var exists bool
		switch test, target := testName.FindStringSubmatch(name), makeTarget.FindStringSubmatch(name); {
		case test != nil:
			exists = known.tests[test[1]]
		case strings.HasSuffix(name, ".txtar"):
			exists = slices.ContainsFunc(known.txtar, func(p string) bool { return p == name || strings.HasSuffix(p, "/"+name) })
		case target != nil:
			exists = slices.Contains(known.targets, target[1])
		default:
			continue
		}
		proofs++
		if !exists {
			bad = append(bad, fmt.Sprintf("%s: %s does not exist", id, name))
		}
	}
	if proofs == 0 {
		bad = append(bad, fmt.Sprintf("%s works, but no test shows it", id))
	}
	return bad
}

func TestFeatureViolations(t *testing.T) {
	known := evidence{tests: map[string]bool{"TestLoad": true}, txtar: []string{"lab/scenarios/replace.txtar"}, targets: []string{"demo"}}
	for _, tt := range []struct{ name, row, want string }{
		{"a test that exists", " loads | works | `TestLoad/next sequence` ", ""},
		{"a story that exists, by its last part", " loads | works | `scenarios/replace.txtar` ", ""},
		{"a target that exists", " loads | works | `make demo` ", ""},
		{"other code in the proof is no matter", " loads | works | `TestLoad` with `replace` set ", ""},
		{"missing things need no test", " loads | not yet | the loader ", ""},
		{"a test that does not exist", " loads | works | `TestGone` ", "does not exist"},
		{"a story that does not exist", " loads | works | `gone.txtar` ", "does not exist"},
		{"works without a test", " loads | works | trust us ", "no test shows it"},
		{"a state of its own", " loads | mostly | x ", "is none of"},
		{"nothing said", " loads | partly |  ", "neither"},
		{"a cell too few", " loads | works ", "three cells"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := strings.Join(featureViolations("A1", tt.row, known), "; ")
			if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("violations = %q, want %q", got, tt.want)
			}
		})
	}
}

var (
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(`)
	target   = regexp.MustCompile(`(?m)^([a-z-]+):`)
)

// testsOfTree collects what can be named as a proof. Build tags do not
// matter here.
func testsOfTree(t *testing.T) evidence {
	t.Helper()
	e := evidence{tests: map[string]bool{}}
	for _, file := range filesBelow(t, ".", ".go") {
		for _, m := range testFunc.FindAllStringSubmatch(readText(t, file), -1) {
			e.tests[m[1]] = true
		}
	}
	// Stories live in testdata too, which filesBelow leaves out.
	err := fs.WalkDir(os.DirFS("."), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (path == ".git" || path == "bin") {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, ".txtar") {
			e.txtar = append(e.txtar, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range target.FindAllStringSubmatch(readText(t, "Makefile"), -1) {
		e.targets = append(e.targets, m[1])
	}
	return e
}

func countOf(list []string, s string) int {
	n := 0
	for _, x := range list {
		if x == s {
			n++
		}
	}
	return n
}
