// SPDX-License-Identifier: Apache-2.0

// Package story is the language in which the lab's scenarios are written: it
// turns one text into a Story, or says in which line what is wrong. It must
// not run anything; package player does.
//
// A story is a txtar text: comment lines that say what it proves, header
// lines, commands, and files for the guest. Start reading with Parse. Which
// commands exist is the caller's Grammar.
package story

import (
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/fault"
)

// Limits of a text that a publisher, or somebody else, wrote.
const (
	MaxText  = 1 << 20 // bytes; a story with its small files
	maxLine  = 4 << 10 // bytes of one line of the script
	maxSteps = 500
	maxWords = 64 // of one command
	maxFiles = 64
	maxNeeds = 16
	// MaxTimeout is how long a story may take, boots included.
	MaxTimeout = 2 * time.Hour
	maxMemory  = 16 << 10 // MiB
	maxCPUs    = 16
)

// DefaultTimeout is how long a story may take that does not say, and
// DefaultLimit how long one program of it may: emulated machines are slow.
const (
	DefaultTimeout = 10 * time.Minute
	DefaultLimit   = time.Minute
)

// EachEarlier is the value of Story.Each that makes one trial of each earlier
// sequence.
const EachEarlier = "earlier"

// Story is one scenario as written.
type Story struct {
	Name   string
	Proves string // its first comment lines, as one
	Text   []byte // all of it

	Each      string        // EachEarlier or empty
	Needs     []string      // what must be there, else it is not applicable
	Required  bool          // part of every gate; else only when asked for by name
	CPUs      int           // 0 is the rig's choice
	MemoryMiB int           // 0 is the rig's choice
	Timeout   time.Duration // of the whole
	Limit     time.Duration // of one program
	Take      []string      // files or folders beside the story that go into the guest

	Steps []Step
	Files []File
}

// File is a file for the guest that the story brings.
type File struct {
	Name string // slash-separated
	Data []byte
}

// Mode is that of a program where the file looks like a script.
func (f File) Mode() fs.FileMode {
	if strings.HasPrefix(string(f.Data), "#!") {
		return 0o755
	}
	return 0o644
}

// Step is one command.
type Step struct {
	Line int
	Text string // as written
	If   []Condition
	Not  bool // it must fail
	Name string
	Args []Word
}

// Condition makes a step depend on what is there.
type Condition struct {
	Not  bool
	Need string
}

// Grammar says which words a story may use.
type Grammar struct {
	Commands  map[string]Command
	Needs     []string
	Variables []string
}

// Command is what the language knows of one command.
type Command struct {
	// Check says what is wrong with the arguments; variables are not filled
	// in yet. nil takes none.
	Check func(args []string) error
	// MayFail allows "!" before it.
	MayFail bool
}

var (
	namePattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)
	headerPattern = regexp.MustCompile(`^([a-z]+):(?:\s+(.*))?$`)
)

// ValidName reports whether a name can be a story's.
func ValidName(name string) bool { return namePattern.MatchString(name) }

// Parse reads a story. Errors begin with the file's name and the line.
func Parse(file string, text []byte, g Grammar) (Story, error) {
	s := Story{Text: text, Required: true, Timeout: DefaultTimeout, Limit: DefaultLimit}
	p := parser{file: file, grammar: g, story: &s}
	base := file[strings.LastIndexByte(file, '/')+1:]
	var ok bool
	if s.Name, ok = strings.CutSuffix(base, ".txtar"); !ok || !ValidName(s.Name) {
		return s, p.errorf(0, "a story's file is called NAME.txtar, with lower-case letters, digits and dashes")
	}
	if len(text) > MaxText {
		return s, p.errorf(0, "%d bytes, limit %d: larger files belong beside the story (take:)", len(text), MaxText)
	}
	n := 0
	rest := string(text)
	for rest != "" {
		if name, is := marker(firstLine(rest)); is {
			return s, p.finish(p.files(n, name, rest))
		}
		n++
		var line string
		line, rest, _ = strings.Cut(rest, "\n")
		if err := p.line(n, strings.TrimSuffix(line, "\r")); err != nil {
			return s, err
		}
	}
	return s, p.finish(nil)
}

type parser struct {
	file    string
	grammar Grammar
	story   *Story
	seen    []string // header keys
	talks   bool     // the first comment has ended
}

func (p *parser) errorf(line int, format string, args ...any) error {
	at := p.file
	if line > 0 {
		at += ":" + strconv.Itoa(line)
	}
	return fault.New(fault.Invalid, "bad_story", "%s: %s", at, fmt.Sprintf(format, args...)).
		WithHint("docs/reference/scenarios.md has the language")
}

func (p *parser) finish(err error) error {
	switch s := p.story; {
	case err != nil:
		return err
	case s.Proves == "":
		return p.errorf(1, "it does not say what it proves: begin with comment lines (# ...)")
	case len(s.Steps) == 0:
		return p.errorf(0, "it has no commands")
	}
	return nil
}

// line reads one line of the script.
func (p *parser) line(n int, line string) error {
	if len(line) > maxLine {
		return p.errorf(n, "line of %d bytes, limit %d", len(line), maxLine)
	}
	if strings.IndexFunc(line, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f || r == '\uFFFD' }) >= 0 {
		return p.errorf(n, "control characters, or no UTF-8")
	}
	line = strings.TrimSpace(line)
	if comment, ok := strings.CutPrefix(line, "#"); ok {
		if !p.talks && len(p.story.Steps) == 0 {
			p.story.Proves = strings.TrimSpace(p.story.Proves + " " + strings.TrimSpace(comment))
		}
		return nil
	}
	if p.story.Proves != "" || line != "" {
		p.talks = true
	}
	if line == "" {
		return nil
	}
	if m := headerPattern.FindStringSubmatch(line); m != nil && len(p.story.Steps) == 0 {
		return p.header(n, m[1], m[2])
	}
	return p.step(n, line)
}

func (p *parser) header(n int, key, value string) error {
	if slices.Contains(p.seen, key) {
		return p.errorf(n, "%s: is there twice", key)
	}
	p.seen = append(p.seen, key)
	s := p.story
	var err error
	switch key {
	case "each":
		if s.Each = value; value != EachEarlier {
			return p.errorf(n, "each: %q, want %q", value, EachEarlier)
		}
	case "needs":
		if s.Needs = strings.Fields(value); len(s.Needs) == 0 || len(s.Needs) > maxNeeds {
			return p.errorf(n, "needs: want 1 to %d words", maxNeeds)
		}
		for _, need := range s.Needs {
			if !slices.Contains(p.grammar.Needs, need) {
				return p.errorf(n, "needs: %q is unknown; there are %s", need, strings.Join(p.grammar.Needs, ", "))
			}
		}
	case "required":
		if value != "yes" && value != "no" {
			return p.errorf(n, "required: %q, want yes or no", value)
		}
		s.Required = value == "yes"
	case "cpus":
		s.CPUs, err = number(value, maxCPUs)
	case "memory":
		s.MemoryMiB, err = number(value, maxMemory)
	case "timeout":
		s.Timeout, err = Duration(value, MaxTimeout)
	case "limit":
		s.Limit, err = Duration(value, MaxTimeout)
	case "take":
		s.Take = strings.Fields(value)
		if len(s.Take) == 0 || len(s.Take) > maxFiles {
			return p.errorf(n, "take: want 1 to %d files or folders beside the story", maxFiles)
		}
		for _, f := range s.Take {
			if !fs.ValidPath(f) || f == "." {
				return p.errorf(n, "take: %q is not a path beside the story", f)
			}
		}
	default:
		return p.errorf(n, "header %q is unknown", key)
	}
	if err != nil {
		return p.errorf(n, "%s: %v", key, err)
	}
	return nil
}

func number(s string, limit int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > limit {
		return 0, fmt.Errorf("%q, want a number from 1 to %d", s, limit)
	}
	return n, nil
}

// Duration reads a positive duration such as 30s.
func Duration(s string, limit time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d > limit {
		return 0, fmt.Errorf("%q, want a time such as 30s, at most %s", s, limit)
	}
	return d, nil
}

// step reads "[!][condition] command arguments".
func (p *parser) step(n int, line string) error {
	s := Step{Line: n, Text: line}
	for strings.HasPrefix(line, "[") {
		need, rest, ok := strings.Cut(line[1:], "]")
		if !ok {
			return p.errorf(n, "a condition without ]")
		}
		c := Condition{Need: need}
		c.Need, c.Not = strings.CutPrefix(need, "!")
		if !slices.Contains(p.grammar.Needs, c.Need) {
			return p.errorf(n, "condition [%s] is unknown; there are %s", c.Need, strings.Join(p.grammar.Needs, ", "))
		}
		s.If = append(s.If, c)
		line = strings.TrimSpace(rest)
	}
	if rest, ok := strings.CutPrefix(line, "!"); ok {
		s.Not, line = true, strings.TrimSpace(rest)
	}
	words, err := split(line)
	if err != nil {
		return p.errorf(n, "%v", err)
	}
	if len(words) == 0 {
		return p.errorf(n, "no command")
	}
	var name bool
	if s.Name, name = words[0].plain(); !name {
		return p.errorf(n, "a variable as command")
	}
	s.Args = words[1:]
	cmd, ok := p.grammar.Commands[s.Name]
	if !ok {
		return p.errorf(n, "command %.60q is unknown", s.Name)
	}
	if s.Not && !cmd.MayFail {
		return p.errorf(n, "! before %s means nothing", s.Name)
	}
	var args []string
	for _, w := range s.Args {
		for _, part := range w {
			if part.Variable != "" && !slices.Contains(p.grammar.Variables, part.Variable) {
				return p.errorf(n, "${%s} is unknown; there are %s", part.Variable, strings.Join(p.grammar.Variables, ", "))
			}
		}
		args = append(args, w.String())
	}
	switch {
	case cmd.Check == nil && len(args) > 0:
		return p.errorf(n, "%s takes no arguments", s.Name)
	case cmd.Check != nil:
		if err := cmd.Check(args); err != nil {
			return p.errorf(n, "%s: %v", s.Name, err)
		}
	}
	if len(p.story.Steps) == maxSteps {
		return p.errorf(n, "over %d commands", maxSteps)
	}
	p.story.Steps = append(p.story.Steps, s)
	return nil
}

// files reads "-- NAME --" lines with what follows each.
func (p *parser) files(n int, name, rest string) error {
	for {
		n++
		if !fs.ValidPath(name) || name == "." {
			return p.errorf(n, "file %.80q: not a path below /lab", name)
		}
		if slices.ContainsFunc(p.story.Files, func(f File) bool { return f.Name == name }) {
			return p.errorf(n, "file %s is there twice", name)
		}
		if len(p.story.Files) == maxFiles {
			return p.errorf(n, "over %d files", maxFiles)
		}
		_, rest, _ = strings.Cut(rest, "\n")
		var body strings.Builder
		next, is := "", false
		for rest != "" {
			line := firstLine(rest)
			if next, is = marker(line); is {
				break
			}
			n++
			body.WriteString(line)
			rest = rest[len(line):]
		}
		p.story.Files = append(p.story.Files, File{name, []byte(body.String())})
		if !is {
			return nil
		}
		name = next
	}
}

// firstLine includes its end.
func firstLine(s string) string {
	if i := strings.IndexByte(s, '\n'); i >= 0 {
		return s[:i+1]
	}
	return s
}

// marker reads a line that begins a file in a txtar text.
func marker(line string) (name string, ok bool) {
	line = strings.TrimRight(line, "\r\n")
	name, begins := strings.CutPrefix(line, "-- ")
	name, ends := strings.CutSuffix(name, " --")
	name = strings.TrimSpace(name)
	return name, begins && ends && name != ""
}
