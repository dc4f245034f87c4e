// SPDX-License-Identifier: Apache-2.0

// Command testcount reads what "go test -json" writes and tells a person
// what happened.
//
//	go test -json ./... | testcount -save unit.json
//	testcount -total unit.json system.json
//
// The first form prints a line per package, the whole output of tests that
// failed, and the names of skipped tests. It exits with 1 when anything
// failed. With -save it also writes the outcome of each test.
//
// The second form adds up saved outcomes. A test that ran in several steps
// counts once: failed if it failed anywhere, else passed if it passed
// anywhere, else skipped. Subtests count like tests. A package that failed
// without a failing test (it did not compile, or a test killed the process)
// counts as one failure.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	save := flag.String("save", "", "write the outcome of each test to this `file`")
	total := flag.Bool("total", false, "add up saved outcomes instead of reading a test run")
	broken := flag.Int("broken", 0, "with -total: add `n` failures of steps that ran no tests")
	flag.Parse()
	err := run(os.Stdin, os.Stdout, *save, *total, *broken, flag.Args())
	if err != nil {
		fmt.Fprintf(os.Stderr, "testcount: %v\n", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, save string, total bool, broken int, files []string) error {
	if total {
		all := outcomes{}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			var more outcomes
			if err := json.Unmarshal(b, &more); err != nil {
				return fmt.Errorf("parse %s: %w", file, err)
			}
			all.merge(more)
		}
		all.brokenSteps(broken)
		fmt.Fprintln(out, all.line())
		if all.count(failed) > 0 {
			return fmt.Errorf("%d failed", all.count(failed))
		}
		return nil
	}
	got, err := read(in, out)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, got.line())
	if save != "" {
		b, err := json.Marshal(got)
		if err != nil {
			return err
		}
		// A torn file is harmless: it does not parse, and -total says so.
		if err := os.WriteFile(save, b, 0o644); err != nil {
			return err
		}
	}
	if got.count(failed) > 0 {
		return fmt.Errorf("%d failed", got.count(failed))
	}
	return nil
}

// outcome is the end of one test. The words are those of go test -json.
type outcome string

const (
	passed  outcome = "pass"
	failed  outcome = "fail"
	skipped outcome = "skip"
)

// outcomes maps a package, a space and a test to what became of the test. A
// package that failed by itself has an entry without a test.
type outcomes map[string]outcome

func (o outcomes) merge(more outcomes) {
	for name, r := range more {
		if old, ok := o[name]; !ok || rank(r) > rank(old) {
			o[name] = r
		}
	}
}

// rank orders outcomes by what a test that ran several times counts as.
func rank(r outcome) int { return slices.Index([]outcome{skipped, passed, failed}, r) }

func (o outcomes) brokenSteps(n int) {
	for i := range n {
		o[fmt.Sprintf("step %d", i)] = failed
	}
}

func (o outcomes) count(want outcome) int {
	n := 0
	for _, r := range o {
		if r == want {
			n++
		}
	}
	return n
}

// line is what CI reads: the last line of its output.
func (o outcomes) line() string {
	s := fmt.Sprintf("%d passed, %d failed", o.count(passed), o.count(failed))
	if n := o.count(skipped); n > 0 {
		s += fmt.Sprintf(", %d skipped", n)
	}
	return s
}

// event is one line of go test -json; see "go doc test2json".
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build events
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// read follows one test run. Lines that are not events are passed through:
// the go command says there what it could not even start.
func read(in io.Reader, out io.Writer) (outcomes, error) {
	got := outcomes{}
	output := map[string][]string{} // package and test, or import path of a build
	failures := map[string]int{}    // per package
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		var e event
		if text := strings.TrimSpace(line); strings.HasPrefix(text, "{") && json.Unmarshal([]byte(text), &e) == nil {
			follow(e, got, output, failures, out)
		} else if text != "" {
			fmt.Fprintln(out, text)
		}
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}

func follow(e event, got outcomes, output map[string][]string, failures map[string]int, out io.Writer) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		output[key] = append(output[key], e.Output)
	case "build-output":
		output[e.ImportPath] = append(output[e.ImportPath], e.Output)
	case "pass", "fail", "skip":
		if e.Test != "" {
			got[key] = outcome(e.Action)
			report(e, output[key], out)
			if e.Action == "fail" {
				failures[e.Package]++
			}
			delete(output, key)
			return
		}
		endPackage(e, got, output, failures, out)
	}
}

// report prints what a person needs: all of a failure, the reason of a skip.
func report(e event, lines []string, out io.Writer) {
	switch outcome(e.Action) {
	case failed:
		fmt.Fprintf(out, "%s", strings.Join(lines, ""))
	case skipped:
		reason := ""
		for _, l := range lines {
			if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "===") && !strings.HasPrefix(l, "---") {
				reason = l
			}
		}
		fmt.Fprintf(out, "skip  %s %s: %s\n", e.Package, e.Test, reason)
	}
}

func endPackage(e event, got outcomes, output map[string][]string, failures map[string]int, out io.Writer) {
	lines := output[e.Package+" "]
	cached := ""
	if slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "\t(cached)") }) {
		cached = " (cached)"
	}
	switch {
	case e.Action == "skip": // a package without tests
	case e.Action == "fail" && failures[e.Package] == 0:
		got[e.Package+" "] = failed
		fmt.Fprintf(out, "%s%s", strings.Join(output[e.FailedBuild], ""), strings.Join(lines, ""))
		// A test that never ended has no event of its own; its output says where it was.
		for key, l := range output {
			if strings.HasPrefix(key, e.Package+" ") && key != e.Package+" " && key != e.FailedBuild {
				fmt.Fprintf(out, "%s", strings.Join(l, ""))
			}
		}
		fmt.Fprintf(out, "FAIL  %s %.1fs\n", e.Package, e.Elapsed)
	case e.Action == "fail":
		fmt.Fprintf(out, "FAIL  %s %.1fs\n", e.Package, e.Elapsed)
	default:
		fmt.Fprintf(out, "ok    %s %.1fs%s\n", e.Package, e.Elapsed, cached)
	}
	for key := range output {
		if strings.HasPrefix(key, e.Package+" ") {
			delete(output, key)
		}
	}
}
