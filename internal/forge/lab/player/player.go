// SPDX-License-Identifier: Apache-2.0

// Package player plays one story on one machine of the lab: it puts the
// livepatch and what belongs to it into the guest, does the story's commands
// one after the other, and says how it ended and who is to blame.
//
// It starts no machine and keeps nothing; package proof does. Start reading
// with New and Player.Run. The commands are in the table of verbs.go; a new
// one is a row there, and a line of docs/reference/scenarios.md that a test
// asks for.
package player

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/story"
)

// Version is part of every digest of a trial: it changes when a command comes
// to mean something else, so that old results do not count any more.
const Version = 1

// Subject is what is tried, in every story the same.
type Subject struct {
	Built   build.Result
	Earlier []build.Result // sequences that machines may have now
	Tables  Tables
	Checks  map[cve.ID][]byte // program per fix; a fix without one is unchecked
}

// DefaultBusy is how long the machine is kept busy around a load: long enough
// for the transition of a busy machine, and for what a livepatch breaks in
// files, sockets, processes and memory to show.
const DefaultBusy = 15 * time.Second

// Play is one trial of one story.
type Play struct {
	Subject
	Story story.Story
	Over  *build.Result // the earlier sequence of a story with "each: earlier"
	Taken []lab.File    // what the story's "take:" names
	CPUs  int           // of the machine, where the story does not say
	Busy  time.Duration // what ${BUSY} is; 0 means DefaultBusy
	Tell  func(step string)
}

// Step is one command that was done.
type Step struct {
	Line    int     `json:"line"`
	Text    string  `json:"text"`
	Note    string  `json:"note,omitempty"` // what was found or counted
	Skipped bool    `json:"skipped,omitempty"`
	Seconds float64 `json:"seconds"`
}

// Outcome is how a story ended.
type Outcome struct {
	Verdict lab.Verdict
	Why     string // empty for a pass
	Line    int    // of the step that decided; 0 for none of them
	Steps   []Step
	Trouble []lab.Trouble
	Console string // since the story began
	Checked bool   // the checks showed the flaws, and then that they are gone
}

// Player plays one Play.
type Player struct {
	Play
	reached []string // modules of which functions are replaced, and their needs

	m         lab.Machine
	present   []string // of the reached modules, loaded
	able      []string // of the reached modules, loaded at some time
	last      lab.Result
	note      string
	before    string // the console when the story, or the boot, began
	clock     clock
	allow     []*regexp.Regexp
	programs  []*program
	busy      chan error
	leak      leakProbe
	traced    string // the function of "trace"
	untraced  bool   // there was none that can be traced
	flawSeen  bool
	fixedSeen bool
}

// New prepares a play. An error is a mistake in the livepatch's own modules.
func New(p Play) (*Player, error) {
	reached, err := p.Reached()
	if err != nil {
		return nil, err
	}
	if p.Tell == nil {
		p.Tell = func(string) {}
	}
	return &Player{Play: p, reached: reached}, nil
}

// Spec is the machine that the story wants.
func (p *Player) Spec(kernel string) (lab.Spec, error) {
	s := lab.Spec{Name: p.Story.Name, Kernel: kernel, CPUs: p.Story.CPUs, MemoryMiB: p.Story.MemoryMiB}
	if s.CPUs == 0 {
		s.CPUs = p.CPUs
	}
	for _, b := range append([]build.Result{p.Built}, p.Earlier...) {
		s.Files = append(s.Files, lab.File{Name: moduleFile(b), Source: b.Module.Path})
	}
	for _, m := range p.reached {
		s.Files = append(s.Files, lab.File{Name: m + ".ko", Source: p.Tables.Module(m)})
	}
	for id, program := range p.Checks {
		s.Files = append(s.Files, lab.File{Name: checkFile(id), Data: program, Mode: 0o755})
	}
	s.Files = append(s.Files, p.Taken...)
	for _, f := range p.Story.Files {
		s.Files = append(s.Files, lab.File{Name: f.Name, Data: f.Data, Mode: f.Mode()})
	}
	slices.SortStableFunc(s.Files, func(a, b lab.File) int { return strings.Compare(a.Name, b.Name) })
	for i := range s.Files[:len(s.Files)-1] {
		if name := s.Files[i].Name; name == s.Files[i+1].Name {
			return s, fault.New(fault.Invalid, "bad_story", "story %s: two files for the guest are called %s", p.Story.Name, name)
		}
	}
	return s, nil
}

// storyPerFunction is added to a story's time for each replaced function: a
// story puts the livepatch in and takes it back up to eight times.
const storyPerFunction = 8 * perFunction

func moduleFile(b build.Result) string { return b.Sequence.ModuleName() + ".ko" }
func checkFile(id cve.ID) string       { return "check-" + string(id) }

// Run plays the story on a machine that Spec described. ctx bounds the whole.
func (p *Player) Run(ctx context.Context, m lab.Machine) Outcome {
	p.m = m
	var out Outcome
	limit := p.Story.Timeout + time.Duration(len(p.Built.Functions))*storyPerFunction
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the story did not end within %s", limit))
	defer cancel()
	err := p.begin(ctx)
	for _, s := range p.Story.Steps {
		if err != nil {
			break
		}
		start := time.Now()
		step := Step{Line: s.Line, Text: s.Text}
		var applies bool
		if applies, err = p.applies(s.If); applies {
			p.Tell(s.Text)
			err = p.do(ctx, s)
			step.Note, p.note = p.note, ""
		} else {
			step.Skipped = true
		}
		step.Seconds = time.Since(start).Seconds()
		out.Steps = append(out.Steps, step)
		if err != nil {
			out.Line = s.Line
		}
	}
	if err != nil && context.Cause(ctx) != nil {
		err = lab.Brokenf(errors.Join(context.Cause(ctx), err), "play %s", p.Story.Name)
	}
	p.judge(ctx, err, &out)
	out.Checked = p.flawSeen && p.fixedSeen
	return out
}

// Command does one command line, as in a story: for a person who looks at the
// machine after it.
func (p *Player) Command(ctx context.Context, line string) (note string, err error) {
	s, err := story.Parse("shell.txtar", []byte("# one line\n"+line+"\n"), Grammar())
	if err != nil {
		return "", err
	}
	for _, step := range s.Steps {
		if err := p.do(ctx, step); err != nil {
			return "", err
		}
	}
	note, p.note = p.note, ""
	return note, nil
}

func (p *Player) do(ctx context.Context, s story.Step) error {
	var args []string
	for _, w := range s.Args {
		args = append(args, w.Fill(p.variable))
	}
	i := slices.IndexFunc(verbs(), func(v verb) bool { return v.name == s.Name })
	return verbs()[i].do(p, ctx, call{args, s.Not})
}

// applies says whether all conditions of a step hold.
func (p *Player) applies(cs []story.Condition) (bool, error) {
	for _, c := range cs {
		lacks, err := p.Lacks(c.Need)
		if err != nil {
			return false, lab.Brokenf(err, "look at the condition %s", c.Need)
		}
		if (lacks == "") == c.Not {
			return false, nil
		}
	}
	return true, nil
}

// variables are what ${NAME} may be.
var variables = []struct {
	name, says string
	value      func(p *Player) string
}{
	{"BUSY", "how long the busy machine is kept busy (`--busy`, 15s)", func(p *Player) string { return cmp.Or(p.Busy, DefaultBusy).String() }},
	{"CALLS", "how often each check is called to find a leak: 150, or 130 where there are more checks than two", func(p *Player) string { return strconv.Itoa(p.calls()) }},
	{"EARLIER", "name of the module of the earlier sequence; empty where there is none", func(p *Player) string {
		if e := p.earlier(); e != nil {
			return e.Sequence.ModuleName()
		}
		return ""
	}},
	{"PID", "process id of the program that `start` started last", func(p *Player) string {
		if n := len(p.programs); n > 0 {
			return p.programs[n-1].pid
		}
		return ""
	}},
	{"RELEASE", "the kernel release", func(p *Player) string { return string(p.Built.Kernel) }},
	{"THIS", "name of the livepatch's module", func(p *Player) string { return p.Built.Sequence.ModuleName() }},
}

// calls is as few as find a leak of one object per call above the noise, and
// more where that takes no long time.
func (p *Player) calls() int {
	const all, most, least = 300, 150, 130
	return min(max(all/max(len(p.Checks), 1), least), most)
}

func (p *Player) variable(name string) string {
	for _, v := range variables {
		if v.name == name {
			return v.value(p)
		}
	}
	return ""
}

// earlier is the sequence that "earlier" means: the story's, or the newest.
func (p *Player) earlier() *build.Result {
	if p.Over != nil {
		return p.Over
	}
	if n := len(p.Earlier); n > 0 {
		return &p.Earlier[n-1]
	}
	return nil
}

// inGuest is the path of a program: one of the story's own by its name.
func (p *Player) inGuest(name string) string {
	own := func(f string) bool { return f == name }
	if slices.ContainsFunc(p.Story.Files, func(f story.File) bool { return own(f.Name) }) ||
		slices.ContainsFunc(p.Taken, func(f lab.File) bool { return own(f.Name) }) {
		return path.Join(lab.FilesDir, name)
	}
	return name
}

// output runs a program that must work.
func (p *Player) output(ctx context.Context, argv ...string) (string, error) {
	return p.ran(ctx, lab.Command{Argv: argv})
}

// ran runs a command that must succeed.
func (p *Player) ran(ctx context.Context, c lab.Command) (string, error) {
	res, err := p.m.Run(ctx, c)
	text := strings.Join(c.Argv, " ")
	switch {
	case err != nil:
		return "", err
	case res.TimedOut:
		return "", lab.Failf("%s did not end within %s", text, cmp.Or(c.Timeout, lab.DefaultTimeout))
	case res.Exit != 0:
		return "", lab.Failf("%s ended with status %d: %s", text, res.Exit, shorten(string(res.Stderr)))
	}
	return strings.TrimSpace(string(res.Stdout)), nil
}
