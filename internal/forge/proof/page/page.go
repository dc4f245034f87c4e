// SPDX-License-Identifier: Apache-2.0

// Package page makes the report of a livepatch's test: one HTML file for
// people, which needs nothing beside it, no script and no network.
//
// It says what test.json says, with the console of what went wrong, and decides
// nothing. Start with Write.
package page

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/livepatch"
)

const reportFile = "report.html"

// Limits of what a page shows of one scenario: a phone has to open it.
const (
	maxConsole  = 1 << 20 // read
	maxExcerpt  = 16 << 10
	tailLines   = 40 // of a console without trouble
	maxTroubles = 5
)

//go:embed page.html
var source string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"seconds": func(s float64) string { return fmt.Sprintf("%.1f s", s) },
	"short":   func(s string) string { return s[:min(len(s), 12)] },
	"when":    func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") },
	"clean":   func(s string) string { return lab.CleanConsole([]byte(s)) },
}).Parse(source))

// Input is what a page is made of.
type Input struct {
	Result  proof.Result
	Built   build.Result
	RunsDir string // where the consoles are
	Made    string // by which version of the program
}

// view is what the template sees.
type view struct {
	Input
	Says      string
	Total     float64 // seconds of all machines together
	Finished  time.Time
	Wrong     []wrong
	Scenarios []proof.Scenario
	Objects   []object
	Rigs      []string
	Unchecked int
}

// wrong is one scenario that did not pass.
type wrong struct {
	proof.Scenario
	Step     string
	Trouble  []lab.Trouble
	More     int
	Excerpt  string
	Complete bool // the excerpt is the whole console
}

type object struct {
	Name      string
	Functions []string
}

// File is where the page of a build is.
func File(buildDir string) string { return filepath.Join(buildDir, reportFile) }

// Write puts the page beside the build.
func Write(buildDir string, in Input) error {
	b, err := Render(in)
	if err != nil {
		return err
	}
	return durable.WriteFile(File(buildDir), b, 0o644)
}

// Render makes the page.
func Render(in Input) ([]byte, error) {
	v := view{Input: in, Scenarios: order(in.Result.Scenarios)}
	switch in.Result.Verdict {
	case lab.Pass:
		v.Says = "Every required scenario passed. This livepatch may be signed."
	case lab.Fail:
		v.Says = "The livepatch is to blame. It cannot be signed."
	default:
		v.Says = "The lab is to blame, or not everything was tried. That is no pass: run the test again."
	}
	for _, s := range v.Scenarios {
		v.Total += s.Seconds
		if s.Finished.After(v.Finished) {
			v.Finished = s.Finished
		}
		rig := "virtual machines"
		if s.Hardware {
			rig = "hardware: " + s.Rig
		}
		if !slices.Contains(v.Rigs, rig) {
			v.Rigs = append(v.Rigs, rig)
		}
		if s.Verdict != lab.Pass {
			v.Wrong = append(v.Wrong, in.explain(s))
		}
	}
	for _, f := range in.Result.Fixes {
		if f.Check != livepatch.Passed {
			v.Unchecked++
		}
	}
	for _, f := range in.Built.Functions {
		i := slices.IndexFunc(v.Objects, func(o object) bool { return o.Name == f.Object })
		if i < 0 {
			i = len(v.Objects)
			v.Objects = append(v.Objects, object{Name: f.Object})
		}
		v.Objects[i].Functions = append(v.Objects[i].Functions, f.Name)
	}
	var b bytes.Buffer
	err := page.Execute(&b, v)
	return b.Bytes(), err
}

// order puts what went wrong first.
func order(all []proof.Scenario) []proof.Scenario {
	rank := map[lab.Verdict]int{lab.Fail: 0, lab.Broken: 1, lab.Pass: 2}
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b proof.Scenario) int { return rank[a.Verdict] - rank[b.Verdict] })
	return all
}

func (in Input) explain(s proof.Scenario) wrong {
	w := wrong{Scenario: s, Trouble: s.Trouble}
	for _, st := range s.Steps {
		if st.Line == s.Line {
			w.Step = st.Text
		}
	}
	if len(w.Trouble) > maxTroubles {
		w.More = len(w.Trouble) - maxTroubles
		w.Trouble = w.Trouble[:maxTroubles]
	}
	text, err := durable.ReadFile(filepath.Join(in.RunsDir, filepath.Base(s.Run), proof.ConsoleFile), maxConsole)
	if err != nil {
		return w // nothing was printed, or it is gone
	}
	w.Excerpt, w.Complete = excerpt(lab.CleanConsole(text), s.Trouble)
	return w
}

// excerpt is the console around the first trouble, or its end.
func excerpt(console string, trouble []lab.Trouble) (text string, whole bool) {
	lines := strings.Split(strings.TrimRight(console, "\n"), "\n")
	from, to := max(0, len(lines)-tailLines), len(lines)
	if len(trouble) > 0 {
		from = max(0, trouble[0].Line-1-tailLines/4)
		to = min(len(lines), trouble[0].Line-1+2*tailLines)
		from = min(from, to)
	}
	text = strings.Join(lines[from:to], "\n")
	if len(text) > maxExcerpt {
		return strings.ToValidUTF8(text[:maxExcerpt], "") + "\n…", false
	}
	return text, from == 0 && to == len(lines)
}
