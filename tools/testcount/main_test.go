// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRead(t *testing.T) {
	for _, tt := range []struct {
		name, stream, line string
		prints, silent     string
	}{
		{
			name:   "tests and subtests count alike",
			stream: ends("p", "TestA", "pass", "TestA/x", "pass", "TestB", "skip") + end("p", "pass"),
			line:   "2 passed, 0 failed, 1 skipped",
			prints: "ok    p",
		},
		{
			name:   "no skip, no word about skips",
			stream: ends("p", "TestA", "pass") + end("p", "pass"),
			line:   "1 passed, 0 failed",
		},
		{
			name: "the output of a failure is shown, that of a pass is not",
			stream: `{"Action":"output","Package":"p","Test":"TestA","Output":"quiet\n"}` + "\n" +
				`{"Action":"output","Package":"p","Test":"TestB","Output":"got 1, want 2\n"}` + "\n" +
				ends("p", "TestA", "pass", "TestB", "fail") + end("p", "fail"),
			line: "1 passed, 1 failed", prints: "got 1, want 2", silent: "quiet",
		},
		{
			name: "a package that does not compile is one failure",
			stream: `{"ImportPath":"p","Action":"build-output","Output":"x.go:1: undefined: y\n"}` + "\n" +
				`{"ImportPath":"p","Action":"build-fail"}` + "\n" +
				`{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p"}` + "\n",
			line: "0 passed, 1 failed", prints: "undefined: y",
		},
		{
			name: "a test that kills the process is one failure, with its last words",
			stream: `{"Action":"run","Package":"p","Test":"TestA"}` + "\n" +
				`{"Action":"output","Package":"p","Test":"TestA","Output":"about to exit\n"}` + "\n" + end("p", "fail"),
			line: "0 passed, 1 failed", prints: "about to exit",
		},
		{
			name:   "a package without tests counts nothing",
			stream: end("p", "skip"),
			line:   "0 passed, 0 failed",
		},
		{
			name:   "what is not an event is passed through",
			stream: "go: cannot find main module\n",
			line:   "0 passed, 0 failed", prints: "cannot find main module",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			got, err := read(strings.NewReader(tt.stream), &out)
			if err != nil {
				t.Fatal(err)
			}
			if got.line() != tt.line {
				t.Errorf("line = %q, want %q", got.line(), tt.line)
			}
			if !strings.Contains(out.String(), tt.prints) {
				t.Errorf("output %q does not show %q", out.String(), tt.prints)
			}
			if tt.silent != "" && strings.Contains(out.String(), tt.silent) {
				t.Errorf("output %q shows %q", out.String(), tt.silent)
			}
		})
	}
}

func TestTotalCountsATestOnce(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for i, o := range []outcomes{
		{"p TestA": passed, "p TestB": skipped, "p TestC": passed, "p TestD": skipped},
		{"p TestA": passed, "p TestB": passed, "p TestC": failed, "p TestD": skipped},
	} {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, string(rune('a'+i)))
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	var out strings.Builder
	if err := run(nil, &out, "", true, 1, files); err == nil {
		t.Error("no error although a test failed")
	}
	if want := "2 passed, 2 failed, 1 skipped\n"; out.String() != want {
		t.Errorf("total = %q, want %q", out.String(), want)
	}
}

// ends makes the end events of tests, given as name and action.
func ends(pkg string, tests ...string) string {
	var b strings.Builder
	for i := 0; i < len(tests); i += 2 {
		b.WriteString(`{"Action":"` + tests[i+1] + `","Package":"` + pkg + `","Test":"` + tests[i] + `"}` + "\n")
	}
	return b.String()
}

func end(pkg, action string) string {
	return `{"Action":"` + action + `","Package":"` + pkg + `","Elapsed":0.1}` + "\n"
}
