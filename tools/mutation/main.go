// SPDX-License-Identifier: Apache-2.0

// Command mutation takes out each verification step of a machine, one at a
// time, and runs the attack tests (tools/attacktable): at least one must fail,
// or the step could be missing without a test noticing. The steps are in
// steps.txt, each with the text that is taken out; the source stays as it is,
// because the go command reads the changed file from an overlay. Steps that
// are in the TUF library are taken out of a copy of it.
//
//	mutation                     all steps, as a table
//	mutation -steps 9,14         some
//	mutation -write FILE         puts the table between the two marks in FILE
//	mutation -build              only sees that each step can be taken out
//
// It exits with 1 where a step survived, or where its text is not found: the
// code has moved, and steps.txt must follow.
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

//go:embed steps.txt
var stepsText string

func main() {
	only := flag.String("steps", "", "numbers of `steps` or what they check, with commas; empty: all")
	write := flag.String("write", "", "put the table into this `file`")
	build := flag.Bool("build", false, "only see that the code compiles without each check")
	flag.Parse()
	if err := run(*only, *write, *build); err != nil {
		fmt.Fprintln(os.Stderr, "mutation:", err)
		os.Exit(1)
	}
}

// mutant is one check that is taken out.
type mutant struct {
	step     int // of the verification order
	about    string
	file     string // "go-tuf:..." is in the module of that name
	fn       string // function or Type.method; the text must be in it once
	old, new string
	tests    [][]string // arguments of go test
	line     int        // where steps.txt has it
}

func run(only, write string, build bool) error {
	ms, err := parseSteps(stepsText)
	if err != nil {
		return err
	}
	if only != "" {
		wanted := strings.Split(only, ",")
		ms = slices.DeleteFunc(ms, func(m mutant) bool {
			return !slices.Contains(wanted, strconv.Itoa(m.step)) && !slices.Contains(wanted, m.about)
		})
	}
	for _, m := range ms { // all before the first test runs
		if _, _, err := m.apply("."); err != nil {
			return err
		}
	}
	tmp, err := os.MkdirTemp("", "klatch-mutation-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if build {
		return compile(ms, tmp)
	}
	var table strings.Builder
	say := func(format string, args ...any) {
		line := fmt.Sprintf(format, args...)
		fmt.Print(line)
		table.WriteString(line)
	}
	say("| step | check | where | attack tests that fail without it |\n| ---: | --- | --- | --- |\n")
	var survived []string
	steps := map[int]bool{}
	for _, m := range ms {
		failed, err := m.try(tmp)
		if err != nil {
			survived = append(survived, fmt.Sprintf("step %d, %s: %v", m.step, m.about, err))
			continue
		}
		steps[m.step] = true
		say("| %d | %s | `%s` in `%s` | %s |\n", m.step, m.about, m.fn, strings.TrimPrefix(m.file, "internal/"), words(failed))
		if len(failed) == 0 {
			survived = append(survived, fmt.Sprintf("step %d: %s", m.step, m.about))
		}
	}
	say("\n%d checks of %d steps taken out, %d killed, %d survived.\n", len(ms), len(steps), len(ms)-len(survived), len(survived))
	if write != "" {
		if err := into(write, table.String()); err != nil {
			return err
		}
	}
	if len(survived) > 0 {
		return fmt.Errorf("no attack test misses:\n%s", strings.Join(survived, "\n"))
	}
	return nil
}

// compile builds the package of each mutant, with what it needs of others.
func compile(ms []mutant, tmp string) error {
	var bad []string
	for _, m := range ms {
		path, changed, err := m.apply(".")
		if err != nil {
			return err
		}
		instead, err := m.instead(tmp, path, changed)
		if err != nil {
			return err
		}
		pkg := "./" + filepath.Dir(m.file)
		if strings.HasPrefix(m.file, "go-tuf:") {
			pkg = "./internal/tufclient"
		}
		if out, err := exec.Command("go", "build", instead, pkg).CombinedOutput(); err != nil {
			bad = append(bad, fmt.Sprintf("step %d, %s: %s", m.step, m.about, out))
		}
	}
	fmt.Printf("%d checks taken out, %d do not compile\n", len(ms), len(bad))
	if len(bad) > 0 {
		return fmt.Errorf("%s", strings.Join(bad, "\n"))
	}
	return nil
}

// words names the first tests that failed.
func words(failed []string) string {
	if len(failed) == 0 {
		return "**none**"
	}
	const most = 3
	var out []string
	for _, f := range failed[:min(most, len(failed))] {
		out = append(out, "`"+f+"`")
	}
	s := strings.Join(out, ", ")
	if more := len(failed) - most; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

const (
	beginMark = "<!-- made by make mutation -->"
	endMark   = "<!-- end -->"
)

// into puts the table between the marks of a document.
func into(file, table string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the lines %s and %s", file, beginMark, endMark)
	}
	return os.WriteFile(file, []byte(before+beginMark+"\n\n"+table+"\n"+endMark+after), 0o644)
}

// parseSteps reads blocks of this form:
//
//	step NUMBER what is checked
//	in FILE FUNCTION
//	test ARGUMENTS OF GO TEST
//	- text that is taken out, of one line or more
//	+ text that takes its place
func parseSteps(text string) ([]mutant, error) {
	var out []mutant
	for n, line := range strings.Split(text, "\n") {
		word, rest, _ := strings.Cut(line, " ")
		var m *mutant
		if len(out) > 0 {
			m = &out[len(out)-1]
		}
		bad := fmt.Errorf("steps.txt, line %d: %q", n+1, line)
		switch {
		case word == "" || word[0] == '#':
		case word == "step":
			number, about, _ := strings.Cut(rest, " ")
			step, err := strconv.Atoi(number)
			if err != nil || about == "" {
				return nil, bad
			}
			out = append(out, mutant{step: step, about: about, line: n + 1})
		case m == nil:
			return nil, bad
		case word == "in":
			m.file, m.fn, _ = strings.Cut(rest, " ")
		case word == "test":
			m.tests = append(m.tests, strings.Fields(rest))
		case word == "-":
			m.old = strings.TrimPrefix(m.old+"\n"+rest, "\n")
		case word == "+":
			m.new = strings.TrimPrefix(m.new+"\n"+rest, "\n")
		default:
			return nil, bad
		}
	}
	for _, m := range out {
		if m.file == "" || m.fn == "" || m.old == "" || m.new == "" || len(m.tests) == 0 {
			return nil, fmt.Errorf("steps.txt, line %d: step %d lacks a line", m.line, m.step)
		}
	}
	return out, nil
}

// apply gives the path of the file, and its content without the check.
func (m mutant) apply(root string) (path string, changed []byte, err error) {
	bad := func(format string, args ...any) (string, []byte, error) {
		return "", nil, fmt.Errorf("steps.txt, line %d, step %d (%s): %s", m.line, m.step, m.about, fmt.Sprintf(format, args...))
	}
	path = filepath.Join(root, m.file)
	if file, ok := strings.CutPrefix(m.file, "go-tuf:"); ok {
		cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/theupdateframework/go-tuf/v2")
		cmd.Dir = root
		dir, err := cmd.Output()
		if err != nil {
			return bad("find the TUF library: %v", err)
		}
		path = filepath.Join(strings.TrimSpace(string(dir)), file)
	}
	src, err := os.ReadFile(path)
	if err != nil {
		return bad("%v; the code has moved", err)
	}
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, path, src, parser.SkipObjectResolution)
	if err != nil {
		return bad("%v", err)
	}
	from, to := -1, -1
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && name(fn) == m.fn {
			from, to = set.Position(fn.Pos()).Offset, set.Position(fn.End()).Offset
		}
	}
	if from < 0 {
		return bad("%s has no function %s; the code has moved", m.file, m.fn)
	}
	body := src[from:to]
	if n := bytes.Count(body, []byte(m.old)); n != 1 {
		return bad("%s of %s has this text %d times, want once; the code has moved:\n%s", m.fn, m.file, n, m.old)
	}
	changed = slices.Concat(src[:from], bytes.Replace(body, []byte(m.old), []byte(m.new), 1), src[to:])
	if _, err := parser.ParseFile(token.NewFileSet(), path, changed, parser.SkipObjectResolution); err != nil {
		return bad("without the check it is no Go: %v", err)
	}
	path, err = filepath.Abs(path)
	return path, changed, err
}

// name is how a function is called in steps.txt.
func name(fn *ast.FuncDecl) string {
	if fn.Recv == nil || len(fn.Recv.List) != 1 {
		return fn.Name.Name
	}
	t := fn.Recv.List[0].Type
	if star, ok := t.(*ast.StarExpr); ok {
		t = star.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return id.Name + "." + fn.Name.Name
	}
	return fn.Name.Name // of a generic type
}

// try runs the tests of a mutant one after another until attack tests fail.
func (m mutant) try(tmp string) (failed []string, err error) {
	path, changed, err := m.apply(".")
	if err != nil {
		return nil, err
	}
	instead, err := m.instead(tmp, path, changed)
	if err != nil {
		return nil, err
	}
	for _, args := range m.tests {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		out, err := exec.CommandContext(ctx, "go", append([]string{"test", "-json", "-vet=off", "-timeout", "3m", "-run", "Attack", instead}, args...)...).Output()
		cancel()
		var exit *exec.ExitError
		if err == nil {
			continue
		}
		if !errors.As(err, &exit) {
			return nil, err
		}
		failed, built := attacks(out)
		if !built {
			return nil, fmt.Errorf("without the check it does not compile; change what takes its place\n%s%s", exit.Stderr, lastOutput(out))
		}
		if len(failed) > 0 {
			return failed, nil
		}
	}
	return nil, nil
}

// instead writes the changed file, and gives the argument by which the go
// command takes it: an overlay, or for a file of the TUF library, where it
// takes none, another go.mod with a copy of that module.
func (m mutant) instead(tmp, path string, changed []byte) (string, error) {
	file, library := strings.CutPrefix(m.file, "go-tuf:")
	if !library {
		other, list := filepath.Join(tmp, "changed.go"), filepath.Join(tmp, "overlay.json")
		overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{path: other}})
		if err != nil {
			return "", err
		}
		return "-overlay=" + list, errors.Join(os.WriteFile(other, changed, 0o600), os.WriteFile(list, overlay, 0o600))
	}
	dir := filepath.Join(tmp, "go-tuf")
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	from := strings.TrimSuffix(path, filepath.FromSlash(file))
	if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
		return "", err
	}
	to := filepath.Join(dir, filepath.FromSlash(file))
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		return "", err
	}
	sum, err := os.ReadFile("go.sum")
	if err != nil {
		return "", err
	}
	mod = fmt.Appendf(mod, "\nreplace github.com/theupdateframework/go-tuf/v2 => %s\n", dir)
	return "-modfile=" + filepath.Join(tmp, "go.mod"), errors.Join(os.Remove(to), os.WriteFile(to, changed, 0o600),
		os.WriteFile(filepath.Join(tmp, "go.mod"), mod, 0o600), os.WriteFile(filepath.Join(tmp, "go.sum"), sum, 0o600))
}

// attacks lists the attack tests that failed, without their parents; built is
// false where nothing ran.
func attacks(out []byte) (failed []string, built bool) {
	running := map[string]bool{}
	for line := range bytes.Lines(out) {
		var e struct{ Action, Test, Output string }
		if json.Unmarshal(line, &e) != nil || e.Test == "" {
			continue
		}
		built = true
		is := strings.Contains(e.Test, "Attack/")
		switch {
		case e.Action == "run" && is:
			running[e.Test] = true
		case e.Action == "fail" && is:
			failed = append(failed, e.Test)
		}
		if e.Action == "fail" || e.Action == "pass" || e.Action == "skip" {
			delete(running, e.Test)
		}
	}
	for t := range running { // the process died, or did not end
		failed = append(failed, t)
	}
	slices.Sort(failed)
	var leaves []string
	for i, t := range failed {
		if i+1 == len(failed) || !strings.HasPrefix(failed[i+1], t+"/") {
			leaves = append(leaves, t)
		}
	}
	return slices.Compact(leaves), built
}

func lastOutput(out []byte) string {
	var text strings.Builder
	for line := range bytes.Lines(out) {
		var e struct{ Output string }
		if json.Unmarshal(line, &e) == nil {
			text.WriteString(e.Output)
		}
	}
	s := text.String()
	return s[max(0, len(s)-2000):]
}
