// SPDX-License-Identifier: Apache-2.0

// Command fuzzall runs the fuzz targets, two at a time, and prints a table.
//
//	fuzzall            each for a minute
//	fuzzall -readers   those of readers.txt: all that read foreign bytes
//	fuzzall -readers -time 4s -within 3m
//	fuzzall -readers -others 3s   those with a star a minute, the others 3 s
//
// With -within it starts no target after that time, and says which it left
// out. It exits with 1 when one found a failure; the go command leaves the
// input under testdata/fuzz, to be committed with the fix.
package main

import (
	"context"
	_ "embed"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

//go:embed readers.txt
var readersText string

func main() {
	only := flag.Bool("readers", false, "only those that read foreign bytes")
	each := flag.Duration("time", time.Minute, "for each target")
	others := flag.Duration("others", 0, "for each reader without a star; 0: as the rest")
	within := flag.Duration("within", 0, "start none after `this` time; 0: no limit")
	atOnce := flag.Int("at-once", 2, "`targets` at a time, each with one worker")
	flag.Parse()
	if err := run(*only, times{*each, *others}, *within, *atOnce); err != nil {
		fmt.Fprintln(os.Stderr, "fuzzall:", err)
		os.Exit(1)
	}
}

// target is one fuzz function.
type target struct {
	pkg, name string
	reader    string // what it reads, for those of readers.txt
	star      bool
}

// times are how long a target runs.
type times struct{ each, others time.Duration }

// String says both, where there are two.
func (d times) String() string {
	if d.others > 0 {
		return fmt.Sprintf("%s or %s", d.each, d.others)
	}
	return d.each.String()
}

func (d times) of(t target) time.Duration {
	if d.others > 0 && t.reader != "" && !t.star {
		return d.others
	}
	return d.each
}

func run(only bool, each times, within time.Duration, atOnce int) error {
	readers, err := parseReaders(readersText)
	if err != nil {
		return err
	}
	targets, err := find(".", readers)
	if err != nil {
		return err
	}
	if only {
		targets = slices.DeleteFunc(targets, func(t target) bool { return t.reader == "" })
	}
	// The targets open many small files; a disk is not what is tried.
	env := os.Environ()
	if dir, err := os.MkdirTemp("/dev/shm", "klatch-fuzz-"); err == nil {
		defer os.RemoveAll(dir)
		env = append(env, "TMPDIR="+dir)
	}
	fmt.Println("| reader | target | executions | per second | inputs kept | seconds | result |\n| --- | --- | ---: | ---: | ---: | ---: | --- |")
	begin := time.Now()
	var (
		mu     sync.Mutex
		wg     sync.WaitGroup
		failed []string
		late   []string
		next   = make(chan target)
	)
	for range atOnce {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for t := range next {
				o := try(t, each.of(t), env)
				mu.Lock()
				fmt.Println(o.row(t))
				if o.failed {
					failed = append(failed, fmt.Sprintf("%s in %s:\n%s", t.name, t.pkg, o.output))
				}
				mu.Unlock()
			}
		}()
	}
	for _, t := range targets {
		if within > 0 && time.Since(begin) > within {
			late = append(late, t.name+" in "+t.pkg)
			continue
		}
		next <- t
	}
	close(next)
	wg.Wait()
	fmt.Printf("\n%d targets, %s each, %s in all\n", len(targets)-len(late), each, time.Since(begin).Round(time.Second))
	if len(late) > 0 {
		fmt.Printf("no time was left for %d: %s\n", len(late), strings.Join(late, ", "))
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d targets failed\n%s", len(failed), strings.Join(failed, "\n"))
	}
	return nil
}

// reader is one line of readers.txt.
type reader struct {
	what string
	star bool
}

// parseReaders reads lines of "reader | package target", with a star or not.
func parseReaders(text string) (map[target]reader, error) {
	out := map[target]reader{}
	for n, line := range strings.Split(text, "\n") {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		line, star := strings.CutPrefix(line, "* ")
		what, rest, ok := strings.Cut(line, " | ")
		pkg, name, ok2 := strings.Cut(rest, " ")
		if !ok || !ok2 || out[target{pkg: pkg, name: name}].what != "" {
			return nil, fmt.Errorf("readers.txt, line %d: want reader | package target, once each", n+1)
		}
		out[target{pkg: pkg, name: name}] = reader{what, star}
	}
	return out, nil
}

var fuzzFunc = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)

// find lists the fuzz targets below a folder, those of readers.txt first. One
// of that list which is not there is an error.
func find(root string, readers map[target]reader) ([]target, error) {
	var out []target
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && slices.Contains([]string{"testdata", ".git", "bin", "tools"}, e.Name()) {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range fuzzFunc.FindAllStringSubmatch(string(b), -1) {
			t := target{pkg: filepath.ToSlash(rel), name: m[1]}
			r := readers[t]
			t.reader, t.star = r.what, r.star
			out = append(out, t)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for want, r := range readers {
		want.reader, want.star = r.what, r.star
		if !slices.Contains(out, want) {
			return nil, fmt.Errorf("readers.txt names %s of %s, which is not there", want.name, want.pkg)
		}
	}
	slices.SortStableFunc(out, func(a, b target) int {
		return strings.Compare(map[bool]string{false: "0"}[a.reader == ""]+a.pkg+a.name, map[bool]string{false: "0"}[b.reader == ""]+b.pkg+b.name)
	})
	// A package that comes twice in a row is compiled once.
	return out, nil
}

// outcome is how a run ended.
type outcome struct {
	execs, rate, kept string
	took              time.Duration
	failed            bool
	output            string
}

var progress = regexp.MustCompile(`execs: (\d+) \((\d+)/sec\)(?:, new interesting: \d+ \(total: (\d+)\))?`)

func try(t target, each time.Duration, env []string) outcome {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), each+10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-fuzz", "^"+t.name+"$", "-fuzztime", each.String(), "-fuzzminimizetime", "0", "-parallel", "1", "./"+t.pkg)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	return read(string(out), err, time.Since(begin))
}

func read(out string, err error, took time.Duration) outcome {
	o := outcome{took: took, failed: err != nil, output: out, execs: "0"}
	var most int
	for _, m := range progress.FindAllStringSubmatch(out, -1) {
		o.execs = m[1]
		if m[3] != "" {
			o.kept = m[3]
		}
		var n int
		if _, err := fmt.Sscan(m[2], &n); err == nil && n > most {
			most, o.rate = n, m[2]
		}
	}
	return o
}

func (o outcome) row(t target) string {
	result := "nothing found"
	if o.failed {
		result = "**failed**"
	}
	return fmt.Sprintf("| %s | `%s` in `%s` | %s | %s | %s | %.0f | %s |", t.reader, t.name, t.pkg, o.execs, o.rate, o.kept, o.took.Seconds(), result)
}
