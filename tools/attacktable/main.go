// SPDX-License-Identifier: Apache-2.0

// Command attacktable counts the attack tests. An attack test is one whose
// name has Attack/ and the letter of a group in it (TestAttack/M/...,
// TestX/Attack/M/...). It passes when the attack was refused; one that failed
// counts as accepted.
//
//	attacktable -write docs/reference/attacks.md bin/results/*.json
//	attacktable -check docs/reference/attacks.md bin/results/*.json
//
// It reads the outcomes that testcount saves, so nothing runs twice. The cases
// of the catalog, and why some have no test, are in catalog.txt. With -check
// it fails where a group has fewer attacks than the document says, where one
// was accepted, and where the test of a case did not pass.
package main

import (
	"cmp"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

//go:embed catalog.txt
var catalogText string

func main() {
	write := flag.String("write", "", "write the table to this `file`")
	check := flag.String("check", "", "compare the outcomes with the table in this `file`")
	without := flag.String("without", "", "with -write: `groups` that could not run here, such as V; the table says so")
	flag.Parse()
	if err := run(*write, *check, *without, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "attacktable:", err)
		os.Exit(1)
	}
}

func run(write, check, without string, files []string) error {
	cases, err := parseCatalog(catalogText)
	if err != nil {
		return err
	}
	got, err := readOutcomes(files)
	if err != nil {
		return err
	}
	r := count(cases, got, without)
	for _, line := range r.lines() {
		fmt.Println(line)
	}
	if write != "" {
		if len(r.problems) > 0 {
			return fmt.Errorf("%d problems; nothing is written. Run: make test system vm attacks\n%s", len(r.problems), strings.Join(r.problems, "\n"))
		}
		return os.WriteFile(write, []byte(r.markdown()), 0o644)
	}
	b, err := os.ReadFile(check)
	if err != nil {
		return err
	}
	said, err := parseTable(string(b))
	if err != nil {
		return err
	}
	for _, g := range groups {
		switch n, ok := said[g.letter]; {
		case !ok:
			r.problems = append(r.problems, fmt.Sprintf("%s has no row for group %s", check, g.letter))
		case r.attacks[g.letter] < n:
			r.problems = append(r.problems, fmt.Sprintf("group %s: %d attacks ran, %s says %d", g.letter, r.attacks[g.letter], check, n))
		}
	}
	if len(r.problems) > 0 {
		return fmt.Errorf("%s", strings.Join(r.problems, "\n"))
	}
	return nil
}

// group is one of the catalog, with the number of cases that it lists.
type group struct {
	letter, about string
	cases         int
}

var groups = []group{
	{"M", "metadata of the repositories", 44},
	{"R", "rollout and policy", 22},
	{"K", "bundle and module", 26},
	{"T", "transparency log", 14},
	{"A", "evidence", 14},
	{"L", "on the machine, and between check and use", 29},
	{"V", "real kernels under Secure Boot", 16},
	{"C", "ceremonies and recovery", 12},
}

// attackCase is one line of the catalog.
type attackCase struct {
	group, name string
	pkg, test   string // what covers it
	why         string // or why nothing does
}

// parseCatalog reads lines of "GROUP | case | package | test", or of
// "GROUP | case | - | reason" for a case without a test.
func parseCatalog(text string) ([]attackCase, error) {
	var out []attackCase
	for n, line := range strings.Split(text, "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		f := strings.Split(line, " | ")
		if len(f) != 4 || !slices.ContainsFunc(groups, func(g group) bool { return g.letter == f[0] }) || f[1] == "" || f[3] == "" {
			return nil, fmt.Errorf("catalog.txt, line %d: want GROUP | case | package | test", n+1)
		}
		c := attackCase{group: f[0], name: f[1], pkg: f[2], test: f[3]}
		if c.pkg == "-" {
			c.pkg, c.test, c.why = "", "", f[3]
		}
		out = append(out, c)
	}
	return out, nil
}

func readOutcomes(files []string) (map[string]string, error) {
	all := map[string]string{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var one map[string]string
		if err := json.Unmarshal(b, &one); err != nil {
			return nil, fmt.Errorf("parse %s: %w", file, err)
		}
		for name, outcome := range one {
			// A test that ran several times failed if it failed once.
			if old := all[name]; old == "" || outcome == "fail" || old == "skip" {
				all[name] = outcome
			}
		}
	}
	return all, nil
}

// report is what was counted.
type report struct {
	cases    []attackCase
	attacks  map[string]int // by group, passed or not
	passed   map[string]int
	skipped  map[string]int
	without  string
	problems []string
}

func (r report) accepted(group string) int {
	return r.attacks[group] - r.passed[group] - r.skipped[group]
}

var attackName = regexp.MustCompile(`(?:^Test|[ /]Test|/)Attack/([A-Z])/(.+)$`)

func count(cases []attackCase, got map[string]string, without string) report {
	r := report{cases: cases, attacks: map[string]int{}, passed: map[string]int{}, skipped: map[string]int{}, without: without}
	names := make([]string, 0, len(got))
	for name := range got {
		names = append(names, name)
	}
	slices.Sort(names)
	parents := map[string]bool{}
	for _, n := range names {
		for i := strings.LastIndexByte(n, '/'); i > 0; i = strings.LastIndexByte(n[:i], '/') {
			parents[n[:i]] = true
		}
	}
	for _, n := range names {
		m := attackName.FindStringSubmatch(n)
		if m == nil || parents[n] {
			continue
		}
		r.attacks[m[1]]++
		switch got[n] {
		case "pass":
			r.passed[m[1]]++
		case "skip":
			r.skipped[m[1]]++
		default:
			r.problems = append(r.problems, "accepted, or not refused as it must be: "+n)
		}
	}
	for _, c := range cases {
		if c.why != "" || strings.Contains(without, c.group) {
			continue
		}
		switch outcome := find(c, names, got); outcome {
		case "pass":
		case "":
			r.problems = append(r.problems, fmt.Sprintf("case %s %q: its test did not run: %s in %s", c.group, c.name, c.test, c.pkg))
		default:
			r.problems = append(r.problems, fmt.Sprintf("case %s %q: its test ended with %s: %s in %s", c.group, c.name, outcome, c.test, c.pkg))
		}
	}
	return r
}

// find gives the outcome of the test of a case: of that name, or a subtest.
func find(c attackCase, names []string, got map[string]string) string {
	want := strings.ReplaceAll(c.test, " ", "_")
	for _, n := range names {
		pkg, test, _ := strings.Cut(n, " ")
		if pkg == "klatch/"+c.pkg && (test == want || strings.HasSuffix(test, "/"+want)) {
			return got[n]
		}
	}
	return ""
}

// lines are for a person and a log.
func (r report) lines() []string {
	var out []string
	for _, g := range groups {
		covered, all := r.covered(g.letter)
		out = append(out, fmt.Sprintf("attacks %s: %3d run, %3d refused, %d skipped, %d accepted; %d of %d cases", g.letter,
			r.attacks[g.letter], r.passed[g.letter], r.skipped[g.letter], r.accepted(g.letter), covered, all))
	}
	return out
}

func (r report) covered(group string) (covered, all int) {
	for _, c := range r.cases {
		if c.group == group {
			all++
			if c.why == "" {
				covered++
			}
		}
	}
	return covered, all
}

const head = `# The attack catalog

Each attack is an automated test that passes when the attack is refused, with the code that it must have, and nothing on the machine
has changed. Its name has ` + "`Attack/` and the group's letter" + ` in it. The list of cases is older than the tests: it was written down
before the code, so a case without a test shows. Most cases have several tests.

Made by ` + "`make test system vm attacks`" + ` from the outcomes of those tests; do not edit. CI fails when a group has fewer attacks than
this table says, when one is accepted, or when the test of a case below did not run (` + "`make attacks-check`" + `). Cases, tests and reasons are
in ` + "`tools/attacktable/catalog.txt`" + `. That the tests notice when a check is missing: [mutation check](../explanation/mutation-check.md).

| group | about | cases in the catalog | with a test | attacks run | refused | accepted |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
`

func (r report) markdown() string {
	var b strings.Builder
	b.WriteString(head)
	var total [5]int
	for _, g := range groups {
		covered, all := r.covered(g.letter)
		if strings.Contains(r.without, g.letter) {
			fmt.Fprintf(&b, "| %s | %s | %d | %d | CI only | | |\n", g.letter, g.about, all, covered)
			total[0], total[1] = total[0]+all, total[1]+covered
			continue
		}
		row := [5]int{all, covered, r.attacks[g.letter], r.passed[g.letter], r.accepted(g.letter)}
		fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %d | %d |\n", g.letter, g.about, row[0], row[1], row[2], row[3], row[4])
		for i, n := range row {
			total[i] += n
		}
	}
	fmt.Fprintf(&b, "| all | | %d | %d | %d | %d | %d |\n", total[0], total[1], total[2], total[3], total[4])
	b.WriteString("\n## Cases without a test\n\n")
	if total[0] == total[1] {
		b.WriteString("None.\n")
	} else {
		b.WriteString("| group | case | why |\n| --- | --- | --- |\n")
		for _, c := range r.cases {
			if c.why != "" {
				fmt.Fprintf(&b, "| %s | %s | %s |\n", c.group, c.name, c.why)
			}
		}
	}
	for _, g := range groups {
		fmt.Fprintf(&b, "\n## %s: %s\n\n| case | test | in |\n| --- | --- | --- |\n", g.letter, g.about)
		for _, c := range r.cases {
			if c.group == g.letter && c.why == "" {
				fmt.Fprintf(&b, "| %s | %s | `%s` |\n", c.name, cmp.Or(c.test, c.name), c.pkg)
			}
		}
	}
	return b.String()
}

var tableRow = regexp.MustCompile(`(?m)^\| ([A-Z]) \| [^|]+ \| \d+ \| (\d+) \| (\d+|CI only) \|`)

// parseTable reads how many attacks of each group the document speaks of.
func parseTable(doc string) (map[string]int, error) {
	out := map[string]int{}
	for _, m := range tableRow.FindAllStringSubmatch(doc, -1) {
		if m[3] == "CI only" { // where it runs, each case has one attack or more
			m[3] = m[2]
		}
		n, err := strconv.Atoi(m[3])
		if err != nil {
			return nil, err
		}
		out[m[1]] = n
	}
	return out, nil
}
