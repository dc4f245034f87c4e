// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
)

// addCorpus gives the fuzzer the consoles: whole ones, and of each what the
// kernel says around its trouble, which the fuzzer changes faster.
func addCorpus(f *testing.F, add func(raw []byte)) {
	f.Helper()
	logs, err := filepath.Glob("testdata/console/*.log")
	if err != nil || len(logs) == 0 {
		f.Fatalf("no corpus: %v", err)
	}
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		add(raw)
		lines := strings.SplitAfter(lab.CleanConsole(raw), "\n")
		for _, tr := range lab.ScanConsole(lab.CleanConsole(raw)) {
			add([]byte(strings.Join(lines[max(tr.Line-3, 0):min(tr.Line+12, len(lines))], "")))
		}
	}
	add([]byte("[    1.000000] ------------[ cut here ]------------\n[    1.000000] WARNING: CPU: 0\n"))
	add([]byte("<1>[   12.345678][  T123] BUG: \x1b[0m\r\n\xff"))
	add([]byte("login: [    1.000000] Oops: int3: 0000\n[    1.000000] Code: e8 <d3>\n"))
}

const (
	panicLine = "[    9.000000] Kernel panic - not syncing: fuzz\n"
	fineLine  = "[    9.000000] livepatch: 'klatch_1': patching complete\n"
)

// FuzzScanConsole: whatever a serial line brings, reports are in order and
// hold their first lines; what programs print between the kernel's lines
// changes nothing; a panic is never missed, and a fine line is never news.
func FuzzScanConsole(f *testing.F) {
	addCorpus(f, func(raw []byte) { f.Add(raw) })
	f.Fuzz(func(t *testing.T, raw []byte) {
		text := lab.CleanConsole(raw)
		found := lab.ScanConsole(text)
		lines, last := strings.Count(text, "\n")+1, 0
		for _, tr := range found {
			if tr.Line <= last || tr.Line > lines || tr.Kind == "" || tr.Title == "" || !strings.Contains(tr.Report, tr.Title) {
				t.Errorf("%+v in %d lines, after line %d", tr, lines, last)
			}
			last = tr.Line
		}
		same(t, "with a program's lines", found, lab.ScanConsole("a program\n"+strings.ReplaceAll(text, "\n", "\n  BUG: a program\n")))
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		if more := lab.ScanConsole(text + panicLine); len(more) != len(found)+1 || more[len(found)].Kind != lab.Panic {
			t.Errorf("a panic after it: %+v", more)
		}
		same(t, "with a fine line", found, lab.ScanConsole(text+fineLine))
	})
}

// same compares kinds and titles: the place of a line may have changed.
func same(t *testing.T, what string, a, b []lab.Trouble) {
	t.Helper()
	if len(a) != len(b) {
		t.Fatalf("%s: %d reports instead of %d: %+v", what, len(b), len(a), b)
	}
	for i := range a {
		if a[i].Kind != b[i].Kind || a[i].Title != b[i].Title {
			t.Errorf("%s: %+v instead of %+v", what, b[i], a[i])
		}
	}
}

// FuzzJudge: a fault of the lab alone never fails a livepatch and is never a
// pass; trouble on the console is never a pass, whoever is to blame.
func FuzzJudge(f *testing.F) {
	addCorpus(f, func(raw []byte) { f.Add(raw, byte(0)) })
	errs := []error{nil, lab.Failf("still 5"), lab.Brokenf(errors.New("cut"), "run"), errors.New("odd"), lab.ErrGuestRebooted,
		errors.Join(lab.Failf("x"), lab.Brokenf(errors.New("cut"), "run"))}
	f.Fuzz(func(t *testing.T, raw []byte, which byte) {
		err, console := errs[int(which)%len(errs)], lab.CleanConsole(raw)
		found := lab.ScanConsole(console)
		v, troubles := lab.Judge(err, console)
		var broken *lab.BrokenError
		switch {
		case len(troubles) != len(found):
			t.Errorf("%d troubles, the detector found %d", len(troubles), len(found))
		case v == lab.Pass && (err != nil || len(found) > 0):
			t.Errorf("a pass with error %v and %d troubles", err, len(found))
		case v == lab.Fail && len(found) == 0 && (errors.As(err, &broken) || err == nil):
			t.Errorf("a fail for error %v and no trouble", err)
		case v != lab.Pass && v != lab.Fail && v != lab.Broken:
			t.Errorf("verdict %q", v)
		case v == lab.Pass != (err == nil && len(found) == 0):
			t.Errorf("verdict %s for error %v and %d troubles", v, err, len(found))
		}
	})
}

// aboutTime is what Said must do, as an expression.
var aboutTime = regexp.MustCompile(`^.*?\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ?(.*)$`)

// FuzzClassify: reading by hand and hints change nothing.
func FuzzClassify(f *testing.F) {
	addCorpus(f, func(raw []byte) {
		for line := range strings.Lines(lab.CleanConsole(raw)) {
			if text, ok := lab.Said(line); ok && lab.ClassifySlow(text) != "" {
				f.Add(strings.TrimRight(line, "\n"))
			}
		}
	})
	for line := range singleLines {
		f.Add("[   12.345678] " + line)
	}
	f.Add("<1>[   12.345678][  T123] BUG: x")
	f.Add("[[ 1.000000][ C1]x[ 2.000000] Oops: ")
	f.Fuzz(func(t *testing.T, line string) {
		if line = lab.CleanConsole([]byte(line)); strings.Contains(line, "\n") {
			return
		}
		text, ok := lab.Said(line)
		m := aboutTime.FindStringSubmatch(line)
		if ok != (m != nil) || ok && text != strings.TrimRight(m[1], " ") {
			t.Fatalf("%q: the kernel says %q (%v), by expression %q", line, text, ok, m)
		}
		for _, s := range []string{line, text} {
			if a, b := lab.Classify(s), lab.ClassifySlow(s); a != b {
				t.Errorf("%q: %q with hints, %q without", s, a, b)
			}
		}
	})
}
