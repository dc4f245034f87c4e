// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/lab/shell"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/proof/page"
	"klatch/internal/forge/queue"
	"klatch/internal/kernel"
)

// trialFlags say what of a livepatch is tried, and how.
type trialFlags struct {
	rigFlags

	cpus      int
	busy      time.Duration
	parallel  int
	scenarios []string
	again     bool
	shell     bool
}

func testCommand(o *options) *cobra.Command {
	var release, series, replay string
	var f trialFlags
	var asJSON, list bool
	c := &cobra.Command{
		Use:   "test --kernel RELEASE | --series SERIES",
		Short: "Try the newest livepatch on its kernel, in virtual machines or on a board",
		Long: `Plays every story that the livepatch must go through, each on a machine of its
own that boots the stock kernel: it loads from clean, on a busy machine and over
every earlier sequence; the flaw of each fix shows before and not after; it can be
canceled, disabled and loaded again after a restart; the kernel's log stays clean.
Stories of your own, in scenarios/ of the data folder, are required like ours
(docs/reference/scenarios.md).

What was played with the same inputs is not played again, so an interrupted
test goes on, and an unchanged one is done at once. Result, report page and all
runs are kept beside the livepatch: test.json, report.html, runs/.

--board plays them on real hardware, one after the other. The board must boot
that kernel by itself, or its file says how to choose it (docs/howto/board.md).
Its power is cut before and after each.

--series tests the newest livepatch of each kernel of the series that is still
supported, one after the other; the exit status is that of the worst.

Verdict pass, fail (the livepatch) or broken (the lab; never counts as pass).
Exit status 0, 3 or 75.

--scenario plays only some, by name or as a path to a .txtar; the result for
the gate stays as it is. With --shell the machine stays after the story, and you
look around in it, a line of sh at a time; a line such as ":load" does a command of the
story language. --replay plays a run again from its recorded inputs.`,
		Example: `  klatch-forge test --kernel 6.1.0-50-cloud-amd64 --list
  klatch-forge test --series debian-6.1
  klatch-forge test --kernel 6.1.0-50-cloud-amd64
  klatch-forge test --kernel 6.1.0-50-cloud-amd64 --scenario cancel --shell
  klatch-forge test --kernel 6.1.0-50-cloud-amd64 --scenario ./mine.txtar
  klatch-forge test --kernel 6.1.0-50-cloud-amd64 --replay cancel-0123456789ab`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := kernel.Release(release)
			var err error
			switch {
			case series != "":
				return testSeries(cmd, o, series, f, asJSON)
			case f.shell && replay == "" && len(f.scenarios) != 1:
				err = invalid("--shell needs one story")("name it: --scenario NAME")
			case list:
				err = listStories(cmd, o, r, f, asJSON)
			case replay != "":
				err = replayRun(cmd, o, r, replay, f, asJSON)
			default:
				var res proof.Result
				if res, err = runTest(cmd, o, r, f); err == nil {
					return showTest(cmd, o, res, len(f.scenarios) > 0, asJSON)
				}
			}
			return cli.Cannot(err, "test the livepatch of %s", release)
		},
	}
	fl := c.Flags()
	optionalKernelFlag(c, &release)
	fl.StringVar(&series, "series", "", "test for all kernels of this series, such as debian-6.1")
	f.flags(c)
	fl.BoolVar(&asJSON, "json", false, "print the result as JSON (docs/reference/build.md)")
	fl.IntVar(&f.cpus, "cpus", 0, "processors of a machine (default 2)")
	fl.DurationVar(&f.busy, "busy", 0, "how long the busy machine is kept busy (default 15s)")
	fl.IntVar(&f.parallel, "parallel", 0, "machines at once (default: one for each processor)")
	fl.StringArrayVar(&f.scenarios, "scenario", nil, "play only this story: a name, or a path to a .txtar (repeatable)")
	fl.BoolVar(&f.again, "again", false, "play also what was played with the same inputs")
	fl.BoolVar(&list, "list", false, "show the stories for this livepatch, and which are not applicable and why")
	fl.BoolVar(&f.shell, "shell", false, "keep the machine after the story and look around in it")
	fl.StringVar(&replay, "replay", "", "play this run again from its recorded inputs")
	c.MarkFlagsOneRequired("kernel", "series")
	for _, other := range []string{"kernel", "list", "shell", "replay", "scenario"} {
		c.MarkFlagsMutuallyExclusive("series", other)
	}
	c.MarkFlagsMutuallyExclusive("list", "shell")
	c.MarkFlagsMutuallyExclusive("list", "replay")
	c.MarkFlagsMutuallyExclusive("scenario", "replay")
	c.MarkFlagsMutuallyExclusive("shell", "json")
	return c
}

// trial collects what a test of the newest livepatch needs.
func trial(cmd *cobra.Command, o *options, r kernel.Release, f trialFlags) (datadir.Dir, proof.Trial, error) {
	var t proof.Trial
	d, err := o.data()
	if err != nil {
		return d, t, err
	}
	e, err := catalog.Load(d.Path, r)
	if err != nil {
		return d, t, err
	}
	newest, earlier, err := newestBuild(d, r)
	if err != nil {
		return d, t, err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return d, t, err
	}
	q := queue.Open(d.Path, e.Series)
	checks := map[cve.ID][]byte{}
	for _, id := range newest.Fixes {
		program, err := q.Check(id)
		if err != nil {
			return d, t, err
		}
		if program != nil {
			checks[id] = program
		}
	}
	tree := kerneltree.At(cache, e)
	if err := readable(tree.Image()); err != nil {
		return d, t, fault.New(fault.NotFound, "no_image", "kernel to boot: %w", err).WithHint("add the kernel again; your own one with --image bzImage")
	}
	rig, err := f.open(d, cache)
	if err != nil {
		return d, t, err
	}
	if lab.Describe(rig).Kind == lab.Hardware {
		f.parallel = 1
	}
	own, err := proof.Own(d.Path, e.Series, newest.Fixes)
	if err != nil {
		return d, t, err
	}
	only, extra, err := proof.Resolve(f.scenarios)
	if err != nil {
		return d, t, err
	}
	t = proof.Trial{Rig: rig, Kernel: tree.Image(), Tables: proof.Tables{Vmlinux: tree.Symbols(), Module: tree.ModuleFile},
		Built: newest, Earlier: earlier, Checks: checks, Own: append(own, extra...),
		Dir:  proof.RunsDir(build.Dir(d.Path, r, newest.Sequence)),
		CPUs: f.cpus, Busy: f.busy, Parallel: f.parallel, Only: only, Again: f.again || f.shell, Tell: o.console(cmd).step}
	if f.shell {
		t.Hold = lookAround(cmd)
	}
	return d, t, nil
}

func runTest(cmd *cobra.Command, o *options, r kernel.Release, f trialFlags) (proof.Result, error) {
	d, t, err := trial(cmd, o, r, f)
	if err != nil {
		return proof.Result{}, err
	}
	res, err := proof.Run(cmd.Context(), t)
	if err != nil || len(f.scenarios) > 0 {
		return res, err
	}
	dir := build.Dir(d.Path, r, t.Built.Sequence)
	if err := proof.Keep(dir, res); err != nil {
		return res, err
	}
	if res, err = proof.Load(dir); err != nil { // with what other rigs found out
		return res, err
	}
	if err := attestTest(cmd, o, d, t.Built, res); err != nil {
		return res, err
	}
	return res, page.Write(dir, page.Input{Result: res, Built: t.Built, RunsDir: t.Dir, Made: version})
}

// lookAround is the shell on a machine whose story has ended.
func lookAround(cmd *cobra.Command) func(context.Context, *player.Player, lab.Machine, proof.Scenario) {
	return func(ctx context.Context, p *player.Player, m lab.Machine, s proof.Scenario) {
		prompt := ""
		if st, err := os.Stdin.Stat(); err == nil && cmd.InOrStdin() == os.Stdin && st.Mode()&os.ModeCharDevice != 0 {
			prompt = "lab# "
			out(cmd, "%s: %s %s\nThe machine is yours until \"exit\". Files are in %s; \":load\" and its like are commands of stories.\n",
				s.Name, s.Verdict, s.Why, lab.FilesDir)
		}
		sh := shell.Shell{Machine: m, In: cmd.InOrStdin(), Out: cmd.OutOrStdout(), Prompt: prompt, Story: p.Command}
		if err := sh.Run(ctx); err != nil {
			out(cmd, "the shell ended: %v\n", err)
		}
	}
}

func newestBuild(d datadir.Dir, r kernel.Release) (newest build.Result, earlier []build.Result, err error) {
	all, err := build.Read(d.Path, r)
	if err != nil {
		return newest, nil, err
	}
	if len(all) == 0 {
		return newest, nil, invalid("nothing was built for %s", r)("klatch-forge build --kernel " + string(r))
	}
	i := len(all) - 1
	return all[i], slices.Clone(all[:i]), nil
}

func listStories(cmd *cobra.Command, o *options, r kernel.Release, f trialFlags, asJSON bool) error {
	_, t, err := trial(cmd, o, r, f)
	if err != nil {
		return err
	}
	stories, err := proof.List(cmd.Context(), t)
	if err != nil {
		return err
	}
	if asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"scenarios": stories})
	}
	for _, s := range stories {
		state := "required"
		switch {
		case s.NotApplicable != "":
			state = "not applicable: " + s.NotApplicable
		case !s.Required:
			state = "only by name"
		}
		if s.Kept != "" {
			state += ", " + s.Kept + " before with the same inputs"
		}
		out(cmd, "%-28s %s\n%s\n", s.Name, state, wrap(s.Proves, 4, 78))
	}
	return nil
}

// wrap breaks a text into indented lines.
func wrap(text string, indent, width int) string {
	var b strings.Builder
	at := 0
	for w := range strings.FieldsSeq(text) {
		switch {
		case at == 0:
			b.WriteString(strings.Repeat(" ", indent))
			at = indent
		case at+1+len(w) > width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at = indent
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(w)
		at += len(w)
	}
	return b.String()
}

func replayRun(cmd *cobra.Command, o *options, r kernel.Release, run string, f trialFlags, asJSON bool) error {
	d, t, err := trial(cmd, o, r, f)
	if err != nil {
		return err
	}
	all, err := build.Read(d.Path, r)
	if err != nil {
		return err
	}
	for _, b := range all { // a run of an earlier sequence may be replayed too
		dir := proof.RunsDir(build.Dir(d.Path, r, b.Sequence))
		if st, err := os.Stat(filepath.Join(dir, filepath.Base(run))); err == nil && st.IsDir() {
			t.Dir = dir
		}
	}
	s, err := proof.Replay(cmd.Context(), t, run, all)
	if err != nil {
		return err
	}
	if asJSON {
		if err := cli.WriteJSON(cmd.OutOrStdout(), proof.ResultVersion, s); err != nil {
			return err
		}
	} else {
		printScenario(cmd, s)
	}
	return verdictStatus(s.Verdict)
}

// showTest prints a result and gives the exit status. Where only a part was
// played, its verdict is that of the part.
func showTest(cmd *cobra.Command, o *options, res proof.Result, part, asJSON bool) error {
	verdict := res.Verdict
	if part {
		verdict = proof.Worst(res.Scenarios)
		res.Verdict = verdict
	}
	if asJSON {
		b, err := json.MarshalIndent(res, "", "  ")
		if err != nil {
			return err
		}
		out(cmd, "%s\n", b)
		return verdictStatus(verdict)
	}
	out(cmd, "%-8s sequence %d on %s (build %s)\n", verdict, res.Sequence, res.Kernel, res.BuildID[:12])
	printTest(cmd, res, part)
	if d, err := o.data(); err == nil && !part {
		out(cmd, "report   %s\n", page.File(build.Dir(d.Path, kernel.Release(res.Kernel), res.Sequence)))
	}
	return verdictStatus(verdict)
}

func printTest(cmd *cobra.Command, res proof.Result, part bool) {
	for _, s := range res.Scenarios {
		printScenario(cmd, s)
	}
	if part {
		out(cmd, "  Only some stories were played: the result for the gate is as it was.\n")
		return
	}
	for _, n := range res.NotApplicable {
		out(cmd, "  %-8s %-28s %s\n", "-", n.Name, n.Why)
	}
	for _, f := range res.Fixes {
		out(cmd, "  %-8s %s\n", f.Check, f.CVE)
	}
}

func printScenario(cmd *cobra.Command, s proof.Scenario) {
	how := ""
	if s.Reused {
		how = "  (as before)"
	}
	out(cmd, "  %-8s %-28s %5.1f s%s\n", s.Verdict, s.Name, s.Seconds, how)
	if s.Why != "" {
		at := ""
		for _, st := range s.Steps {
			if st.Line == s.Line {
				at = "at \"" + st.Text + "\": "
			}
		}
		out(cmd, "           %s%s\n           run %s\n", at, s.Why, s.Run)
	}
}

func verdictStatus(v lab.Verdict) error {
	switch v {
	case lab.Pass:
		return nil
	case lab.Fail:
		return cli.ExitWith(3)
	default:
		return cli.ExitWith(75)
	}
}
