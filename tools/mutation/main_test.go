// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEveryStepIsWhereStepsTxtSays: the text of each check is in its function,
// once. When this fails the code has moved and steps.txt must follow; the
// command itself fails too.
func TestEveryStepIsWhereStepsTxtSays(t *testing.T) {
	ms, err := parseSteps(stepsText)
	if err != nil {
		t.Fatal(err)
	}
	have := map[int]bool{}
	for _, m := range ms {
		have[m.step] = true
		if _, _, err := m.apply("../.."); err != nil {
			t.Error(err)
		}
	}
	for step := range 20 {
		if !have[step] && !strings.Contains(stepsText, "# step "+string(rune('0'+step/10))+string(rune('0'+step%10))+" ") {
			t.Errorf("nothing of step %d is taken out", step)
		}
	}
}

func TestApply(t *testing.T) {
	dir := t.TempDir()
	src := "package x\n\nfunc a() bool { return false }\n\ntype t struct{}\n\nfunc (*t) b(n int) bool {\n\tif n > 3 {\n\t\treturn false\n\t}\n\treturn true\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "x.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	m := mutant{file: "x.go", fn: "t.b", old: "n > 3", new: "false", line: 1}
	if _, b, err := m.apply(dir); err != nil || !strings.Contains(string(b), "if false {") {
		t.Errorf("%s, %v", b, err)
	}
	for name, change := range map[string]func(*mutant){
		"another function": func(m *mutant) { m.fn = "a" },
		"no function":      func(m *mutant) { m.fn = "t.c" },
		"text twice":       func(m *mutant) { m.old = "return" },
		"no Go":            func(m *mutant) { m.new = "}" },
		"no file":          func(m *mutant) { m.file = "y.go" },
	} {
		m := m
		change(&m)
		if _, _, err := m.apply(dir); err == nil || !strings.Contains(err.Error(), "steps.txt, line 1") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAttacks(t *testing.T) {
	for name, tt := range map[string]struct {
		out   string
		want  string
		built bool
	}{
		"no build":           {`{"Action":"output","Output":"x.go:1: syntax error"}`, "", false},
		"another test fails": {`{"Action":"fail","Test":"TestX"}`, "", true},
		"one that fails": {`{"Action":"run","Test":"TestAttack/M/a"}
{"Action":"fail","Test":"TestAttack/M/a"}
{"Action":"fail","Test":"TestAttack/M"}
{"Action":"pass","Test":"TestX/Attack/K/b"}`, "TestAttack/M/a", true},
		"one that does not end": {`{"Action":"run","Test":"TestX/Attack/K/b"}`, "TestX/Attack/K/b", true},
	} {
		got, built := attacks([]byte(tt.out))
		if strings.Join(got, " ") != tt.want || built != tt.built {
			t.Errorf("%s: %q, %v", name, got, built)
		}
	}
}

func TestInto(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.md")
	if err := os.WriteFile(file, []byte("a\n"+beginMark+"\nold\n"+endMark+"\nb\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := into(file, "new\n"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if want := "a\n" + beginMark + "\n\nnew\n\n" + endMark + "\nb\n"; err != nil || string(b) != want {
		t.Errorf("%q, %v", b, err)
	}
}
