// SPDX-License-Identifier: Apache-2.0

// Mutate takes the checks out of a package one at a time and runs its tests: a
// check that no test misses might as well not be there. A check is a condition
// that leads to a refusal: an if, or a case of a switch, whose body ends in a
// return of a call to refuse, Refuse, bad or fault.New. Of several conditions
// joined by || each is taken out by itself. The source stays as it is; the go
// command reads the changed file from an overlay.
//
//	go -C tools build -o ../bin/mutate ./mutate
//	bin/mutate ./internal/evidence
//	bin/mutate ./internal/evidence/check.go
//
// It writes a Markdown table, and ends with status 1 where a check survived.
package main

import (
	"context"
	"encoding/json"
	"errors"
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

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: mutate FOLDER|FILE [go test arguments]")
		os.Exit(2)
	}
	survived, err := run(os.Args[1], os.Args[2:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
	if survived > 0 {
		os.Exit(1)
	}
}

// mutant is one condition that is made false.
type mutant struct {
	from, to int // offsets of the condition
	line     int
	code     string
	text     string
}

func run(dir string, args []string) (survived int, err error) {
	pattern := filepath.Join(dir, "*.go")
	if strings.HasSuffix(dir, ".go") {
		pattern, dir = dir, "./"+filepath.Dir(dir)
	}
	files, err := filepath.Glob(pattern)
	if err != nil {
		return 0, err
	}
	tmp, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	if len(args) == 0 {
		args = []string{dir}
	}
	fmt.Println("| check taken out | code | tests |\n| --- | --- | --- |")
	counts := map[string]int{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			return 0, err
		}
		ms, err := mutants(file, src)
		if err != nil {
			return 0, err
		}
		for _, m := range ms {
			changed := slices.Concat(src[:m.from], []byte("false && ("), src[m.from:m.to], []byte(")"), src[m.to:])
			verdict, err := try(tmp, file, changed, args)
			if err != nil {
				return 0, err
			}
			counts[verdict]++
			fmt.Printf("| `%s:%d` `%s` | %s | %s |\n", filepath.Base(file), m.line, strings.ReplaceAll(m.text, "|", "\\|"), m.code, verdict)
		}
	}
	fmt.Printf("\n%d killed, %d survived, %d do not compile\n", counts[killed], counts[alive], counts[notRun])
	return counts[alive], nil
}

const (
	killed = "killed"
	alive  = "**survived**"
	notRun = "not run"
)

// try runs the tests with one changed file.
func try(tmp, file string, changed []byte, args []string) (string, error) {
	abs, err := filepath.Abs(file)
	if err != nil {
		return "", err
	}
	other := filepath.Join(tmp, "changed.go")
	if err := os.WriteFile(other, changed, 0o600); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{abs: other}})
	if err != nil {
		return "", err
	}
	list := filepath.Join(tmp, "overlay.json")
	if err := os.WriteFile(list, overlay, 0o600); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "go", append([]string{"test", "-vet=off", "-failfast", "-overlay", list}, args...)...).CombinedOutput()
	var failed *exec.ExitError
	switch {
	case err == nil:
		return alive, nil
	case !errors.As(err, &failed):
		return "", err
	case strings.Contains(string(out), "[build failed]"):
		return notRun, nil
	}
	return killed, nil
}

// mutants finds the conditions of a file.
func mutants(name string, src []byte) ([]mutant, error) {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, name, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var out []mutant
	add := func(cond ast.Expr, code string) {
		for _, e := range operands(cond) {
			from, to := set.Position(e.Pos()), set.Position(e.End())
			out = append(out, mutant{from.Offset, to.Offset, from.Line, code, strings.Join(strings.Fields(string(src[from.Offset:to.Offset])), " ")})
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.IfStmt:
			if code, ok := refuses(n.Body.List); ok {
				add(n.Cond, code)
			}
		case *ast.SwitchStmt:
			if n.Tag != nil {
				return true
			}
			for _, s := range n.Body.List {
				c, ok := s.(*ast.CaseClause)
				if !ok {
					continue
				}
				if code, ok := refuses(c.Body); ok {
					for _, e := range c.List {
						add(e, code)
					}
				}
			}
		}
		return true
	})
	return out, nil
}

// operands takes a || b || c apart.
func operands(e ast.Expr) []ast.Expr {
	if b, ok := e.(*ast.BinaryExpr); ok && b.Op == token.LOR {
		return append(operands(b.X), operands(b.Y)...)
	}
	return []ast.Expr{e}
}

// refuses says whether statements end in a refusal, and its code.
func refuses(body []ast.Stmt) (code string, ok bool) {
	if len(body) == 0 {
		return "", false
	}
	ret, is := body[len(body)-1].(*ast.ReturnStmt)
	if !is {
		return "", false
	}
	ast.Inspect(ret, func(n ast.Node) bool {
		call, is := n.(*ast.CallExpr)
		if !is {
			return true
		}
		switch fun := call.Fun.(type) {
		case *ast.Ident:
			ok = ok || fun.Name == "refuse" || fun.Name == "bad" || fun.Name == "Refuse"
		case *ast.SelectorExpr:
			ok = ok || fun.Sel.Name == "Refuse" || fun.Sel.Name == "New"
		}
		for _, a := range call.Args {
			if lit, is := a.(*ast.BasicLit); is && lit.Kind == token.STRING && code == "" {
				if s, err := strconv.Unquote(lit.Value); err == nil && !strings.Contains(s, " ") {
					code = s
				}
			}
		}
		return true
	})
	return code, ok
}
