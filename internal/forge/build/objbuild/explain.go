// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"debug/dwarf"
	"debug/elf"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/delta"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/build/review"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Explanation says of one function what changes and why the livepatch replaces
// it, or why not.
type Explanation struct {
	Function    string          `json:"function"`
	Result      build.Outcome   `json:"result"` // of the whole build
	InLivepatch bool            `json:"in_livepatch"`
	Why         []string        `json:"why"` // it is in the livepatch, or not
	Hunks       []Hunk          `json:"hunks"`
	Code        []Code          `json:"code"`
	Proof       []match.Proved  `json:"proof"`
	Refusals    []build.Refusal `json:"refusals"`
	Warnings    []build.Refusal `json:"warnings"`
}

// Hunk is a change of the source that touches the function, or one that is
// compiled into it.
type Hunk struct {
	Patch    string `json:"patch"`
	File     string `json:"file"`
	Function string `json:"function"` // in which it lies
	Text     string `json:"text"`
}

// Code is the object code of the function in one object file.
type Code struct {
	Object   string   `json:"object"`
	File     string   `json:"file"`
	Symbol   string   `json:"symbol"`
	Old      int      `json:"old_bytes"`
	New      int      `json:"new_bytes"`
	Inlines  []string `json:"inlines"` // what is compiled into it, of what changes
	Gained   []string `json:"gained"`  // references
	Lost     []string `json:"lost"`
	Callers  []string `json:"callers"` // in the same object file
	Assembly []string `json:"assembly"`
}

// Explain checks a plan, as Check does, and explains one function of it.
func (d *Driver) Explain(ctx context.Context, p compose.Plan, function string, clock *build.Clock) (Explanation, error) {
	e := Explanation{Function: function, Why: []string{}, Hunks: []Hunk{}, Code: []Code{}, Proof: []match.Proved{},
		Refusals: []build.Refusal{}, Warnings: []build.Refusal{}}
	res, err := d.run(ctx, p, "", clock, false, func(ctx context.Context, j *job) error { return j.explain(ctx, &e) })
	e.Result = res.Result
	return e, err
}

func (j *job) explain(ctx context.Context, e *Explanation) error {
	changed := map[string][]Hunk{} // by the function that they lie in
	for _, p := range j.plan.Patches {
		if err := j.hunks(p, changed); err != nil {
			return err
		}
	}
	is := func(name string) bool { return delta.Source(name) == e.Function }
	for _, f := range j.result.Functions {
		e.InLivepatch = e.InLivepatch || is(f.Name)
	}
	for _, p := range j.result.Match.Replaced {
		if is(p.Function) {
			e.Proof = append(e.Proof, p)
		}
	}
	for _, r := range j.result.Refusals {
		if r.Function == "" || is(r.Function) {
			e.Refusals = append(e.Refusals, r)
		}
	}
	for _, w := range j.result.Warnings {
		if is(w.Function) {
			e.Warnings = append(e.Warnings, w)
		}
	}
	e.Hunks = append(e.Hunks, changed[e.Function]...)
	var inlinedInto []string
	for _, o := range j.objects {
		if o.patched == "" || !exists(o.patched) {
			continue
		}
		into, err := j.explainObject(ctx, o, changed, e)
		if err != nil {
			return err
		}
		inlinedInto = append(inlinedInto, into...)
	}
	if len(e.Code) == 0 && len(changed[e.Function]) == 0 && len(inlinedInto) == 0 {
		return fault.New(fault.NotFound, "no_function", "function %s is in none of the %d object files that the queue reaches", e.Function, len(j.objects)).
			WithHint("klatch-forge build names the functions that the livepatch replaces")
	}
	e.reasons(j, changed, inlinedInto)
	return nil
}

// hunks groups a patch's changes by the function that they lie in.
func (j *job) hunks(p queue.Patch, into map[string][]Hunk) error {
	edits := queue.Edits(p.Diff)
	for _, f := range p.Files {
		b, err := durable.ReadFile(filepath.Join(j.tree.Source(), f), maxSource)
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		for _, c := range review.Changes(lines, edits[f]) {
			var text []string
			for _, l := range c.Removed {
				text = append(text, "-"+l)
			}
			for _, l := range c.Added {
				text = append(text, "+"+l)
			}
			into[c.Name] = append(into[c.Name], Hunk{p.Name, f, c.Name, strings.Join(text, "\n")})
		}
	}
	return nil
}

// explainObject adds what an object file has of the function, and returns the
// functions that it is compiled into.
func (j *job) explainObject(ctx context.Context, o *object, changed map[string][]Hunk, e *Explanation) ([]string, error) {
	before, err := durable.ReadFile(o.original, livepatch.MaxModule)
	if err != nil {
		return nil, err
	}
	after, err := durable.ReadFile(o.patched, livepatch.MaxModule)
	if err != nil {
		return nil, err
	}
	was, err := delta.Describe(before, e.Function)
	if err != nil {
		return nil, err
	}
	is, err := delta.Describe(after, e.Function)
	if err != nil {
		return nil, err
	}
	if len(was)+len(is) == 0 && len(changed[e.Function]) == 0 {
		return nil, nil
	}
	inlines, err := j.inlines(ctx, o)
	if err != nil {
		return nil, err
	}
	var into []string
	for f, all := range inlines {
		if slices.Contains(all, e.Function) && f != e.Function {
			into = append(into, f)
		}
	}
	slices.Sort(into)
	for _, f := range is {
		c := Code{Object: o.unit.Object, File: o.unit.Source, Symbol: f.Symbol, New: f.Bytes, Callers: append([]string{}, f.Callers...),
			Inlines: []string{}, Gained: []string{}, Lost: []string{}, Assembly: []string{}}
		var old delta.Function
		if i := slices.IndexFunc(was, func(w delta.Function) bool { return suffix(w.Symbol) == suffix(f.Symbol) }); i >= 0 {
			old = was[i]
			c.Old = old.Bytes
		}
		c.Gained = append(c.Gained, without(f.Refers, old.Refers)...)
		c.Lost = append(c.Lost, without(old.Refers, f.Refers)...)
		for _, n := range inlines[e.Function] {
			if len(changed[n]) > 0 {
				c.Inlines = append(c.Inlines, n)
				for _, h := range changed[n] {
					if !slices.Contains(e.Hunks, h) {
						e.Hunks = append(e.Hunks, h)
					}
				}
			}
		}
		if !o.same {
			if c.Assembly, err = j.disassemble(ctx, o, old.Symbol, f.Symbol); err != nil {
				return nil, err
			}
		}
		e.Code = append(e.Code, c)
	}
	return into, nil
}

// suffix is what the compiler made of a name, without numbers, which move.
func suffix(symbol string) string {
	_, s, _ := strings.Cut(symbol, ".")
	return strings.Trim(s, "0123456789.")
}

func without(a, b []string) []string {
	var out []string
	for _, s := range a {
		if !slices.Contains(b, s) {
			out = append(out, s)
		}
	}
	return out
}

// reasons puts what was found into sentences.
func (e *Explanation) reasons(j *job, changed map[string][]Hunk, inlinedInto []string) {
	why := func(format string, args ...any) {
		if s := fmt.Sprintf(format, args...); !slices.Contains(e.Why, s) {
			e.Why = append(e.Why, s)
		}
	}
	own := len(changed[e.Function]) > 0
	differs := false
	for _, c := range e.Code {
		differs = differs || len(c.Assembly) > 0
	}
	switch {
	case j.result.Result == build.Refused && len(e.Refusals) > 0:
		why("the build was refused: %s", e.Refusals[0].Code)
	case e.InLivepatch && own:
		why("its own source changes")
	}
	for _, c := range e.Code {
		if c.Symbol != e.Function {
			why("the compiler made %s of it", c.Symbol)
		}
		if c.Old == 0 && c.Symbol == e.Function {
			why("it is new: the livepatch brings it along for %s", strings.Join(c.Callers, ", "))
		}
		for _, n := range c.Inlines {
			why("%s is compiled into it, whose source changes", n)
		}
		for _, n := range c.Gained {
			why("it refers to %s, as it did not before", n)
		}
	}
	switch {
	case e.InLivepatch && len(e.Why) == 0:
		why("its object code differs, though no line of it changes: a macro, a constant or a type that it uses, or another choice of the compiler's")
	case !e.InLivepatch && own && len(e.Code) == 0 && len(inlinedInto) > 0:
		why("it has no code of its own: it is compiled into %s, which the livepatch replaces instead", strings.Join(inlinedInto, ", "))
	case !e.InLivepatch && own && len(e.Code) == 0 && len(inlinedInto) == 0:
		why("it is in no object file: this configuration compiles it out, or nobody uses it")
	case !e.InLivepatch && len(e.Code) > 0 && !differs && j.result.Result != build.Refused:
		why("its object code is the same before and after")
	}
}

var (
	noDebug    = regexp.MustCompile(` -g0 `)
	outputName = regexp.MustCompile(` -c -o (\S+)\.o `)
)

const maxDebug = 512 << 20 // object file with debug information, in bytes

// inlines compiles the patched source once more, with debug information, which
// says what the compiler put into each function (DWARF 4, 3.3.8).
func (j *job) inlines(ctx context.Context, o *object) (map[string][]string, error) {
	compile, _, _ := strings.Cut(o.cmd, " ; ")
	compile = writesDeps.ReplaceAllString(noDebug.ReplaceAllString(compile+" ", " -gdwarf-4 "), "")
	out := strings.TrimSuffix(o.unit.Target, ".o") + ".explain.o"
	compile = outputName.ReplaceAllString(compile, " -c -o "+out+" ")
	if res, err := j.runTasks(ctx, []task{{out: out, command: compile}}, nil); err != nil {
		return nil, err
	} else if res.Exit != 0 {
		return nil, fault.New(fault.Internal, "compile", "compile %s with debug information: %s", o.unit.Source, shorten(res.Output))
	}
	b, err := durable.ReadFile(j.upper(out), maxDebug)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("read debug information of %s: %w", o.unit.Source, err)
	}
	d, err := f.DWARF()
	if err != nil {
		return nil, fmt.Errorf("read debug information of %s: %w", o.unit.Source, err)
	}
	return readInlines(d)
}

// readInlines lists for each function the names of what is inlined into it.
func readInlines(d *dwarf.Data) (map[string][]string, error) {
	names := map[dwarf.Offset]string{}
	origin := map[dwarf.Offset]dwarf.Offset{}
	type site struct{ in, of dwarf.Offset }
	var sites []site
	var stack []dwarf.Offset // subprogram that each open entry lies in
	r := d.Reader()
	for {
		e, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("read debug information: %w", err)
		}
		if e == nil {
			break
		}
		if e.Tag == 0 {
			if len(stack) > 0 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		var in dwarf.Offset
		if len(stack) > 0 {
			in = stack[len(stack)-1]
		}
		of, has := e.Val(dwarf.AttrAbstractOrigin).(dwarf.Offset)
		switch e.Tag { //nolint:exhaustive // the others say nothing of inlining
		case dwarf.TagSubprogram:
			in = e.Offset
			if n, ok := e.Val(dwarf.AttrName).(string); ok {
				names[e.Offset] = n
			}
			if has {
				origin[e.Offset] = of
			}
		case dwarf.TagInlinedSubroutine:
			if has && in != 0 {
				sites = append(sites, site{in, of})
			}
		}
		if e.Children {
			stack = append(stack, in)
		}
	}
	name := func(o dwarf.Offset) string {
		for range 4 { // an instance names its abstract one
			if n := names[o]; n != "" {
				return n
			}
			o = origin[o]
		}
		return ""
	}
	out := map[string][]string{}
	for _, s := range sites {
		in, of := name(s.in), name(s.of)
		if in != "" && of != "" && !slices.Contains(out[in], of) {
			out[in] = append(out[in], of)
		}
	}
	return out, nil
}

// disassemble compares the instructions of a function before and after.
func (j *job) disassemble(ctx context.Context, o *object, before, after string) ([]string, error) {
	var text [2][]string
	for i, x := range []struct{ file, symbol string }{{o.original, before}, {o.patched, after}} {
		if x.symbol == "" {
			continue
		}
		res, err := j.run(ctx, sandbox.Command{Argv: []string{"objdump", "-dr", "--no-show-raw-insn", "--disassemble=" + x.symbol, x.file}})
		if err != nil {
			return nil, err
		}
		if res.Exit != 0 {
			return nil, fault.New(fault.Internal, "objdump", "disassemble %s: %s", x.symbol, shorten(res.Output))
		}
		text[i] = instructions(res.Output, x.symbol)
	}
	return difference(text[0], text[1]), nil
}

var (
	place      = regexp.MustCompile(`^\s*[0-9a-f]+:\s*`)
	ownAddress = regexp.MustCompile(`\b[0-9a-f]+ <([^>+]+)(?:\+0x[0-9a-f]+)?>`)
	addend     = regexp.MustCompile(`-0x4$`)
)

// instructions takes the lines of objdump without addresses: what moved is the
// same.
func instructions(out []byte, symbol string) []string {
	var lines []string
	for raw := range strings.Lines(string(out)) {
		l := strings.TrimRight(raw, "\n")
		if !place.MatchString(l) || strings.HasSuffix(l, ">:") {
			continue
		}
		l = place.ReplaceAllString(l, "")
		l = ownAddress.ReplaceAllString(l, "<$1>")
		if strings.HasPrefix(l, "R_X86_64") {
			l = "    " + addend.ReplaceAllString(l, "")
		}
		l = strings.ReplaceAll(strings.TrimSpace(strings.ReplaceAll(l, "\t", " ")), "<"+symbol+">", "<here>")
		if l != "" {
			lines = append(lines, l)
		}
	}
	return lines
}

// maxLines limits the comparison, whose cost is the product of both sides.
const maxLines = 4000

// difference lists the lines that only one side has, with "-" and "+", and one
// line around them.
func difference(a, b []string) []string {
	if slices.Equal(a, b) {
		return []string{}
	}
	if len(a) > maxLines || len(b) > maxLines {
		return []string{fmt.Sprintf("%d and %d lines: too long to compare", len(a), len(b))}
	}
	common := make([][]uint16, len(a)+1) // length of the longest common rest
	for i := range common {
		common[i] = make([]uint16, len(b)+1)
	}
	for i, x := range slices.Backward(a) {
		for k, y := range slices.Backward(b) {
			if x == y {
				common[i][k] = common[i+1][k+1] + 1
			} else {
				common[i][k] = max(common[i+1][k], common[i][k+1])
			}
		}
	}
	var all []string
	for i, k := 0, 0; i < len(a) || k < len(b); {
		switch {
		case i < len(a) && k < len(b) && a[i] == b[k]:
			all = append(all, "  "+a[i])
			i, k = i+1, k+1
		case i < len(a) && (k == len(b) || common[i+1][k] >= common[i][k+1]):
			all = append(all, "- "+a[i])
			i++
		default:
			all = append(all, "+ "+b[k])
			k++
		}
	}
	var out []string
	for i, l := range all {
		near := l[0] != ' ' || i > 0 && all[i-1][0] != ' ' || i+1 < len(all) && all[i+1][0] != ' '
		if near {
			out = append(out, l)
		} else if len(out) > 0 && out[len(out)-1] != "  …" {
			out = append(out, "  …")
		}
	}
	return out
}
