// SPDX-License-Identifier: Apache-2.0

package player

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/guest"
	"klatch/internal/forge/lab/story"
)

// exitLab is the exit status by which a program of a story says that the lab
// lacks something (EX_TEMPFAIL of sysexits.h): broken, not fail.
const exitLab = 75

var programVerbs = []verb{
	{"run", "PROGRAM [ARGUMENT...]", "runs a program to its end; it must end with status 0, or with `!` another one. Status 75 says that the lab lacks something. Files of the story go by their names. Lines of its output that begin with `note: ` are in the result", true,
		count(1, 64), (*Player).run},
	{"stdout", "REGEXP", "the output of the last `run`, or of what `stop` ended, matches (`^` and `$` are those of a line); with `!` it does not", true, oneRegexp,
		func(p *Player, _ context.Context, c call) error { return matches("output", string(p.last.Stdout), c) }},
	{"stderr", "REGEXP", "the same for its error output", true, oneRegexp,
		func(p *Player, _ context.Context, c call) error {
			return matches("error output", string(p.last.Stderr), c)
		}},
	{"start", "PROGRAM [ARGUMENT...]", "starts a program and goes on; `${PID}` is its process id", false, count(1, 64), (*Player).start},
	{"stop", "", "ends the program that was started last, and its children", false, nil, (*Player).stop},
	{"busy", "TIME", "begins to put load on the machine for this long: files, page cache, sockets, processes, memory, each checking its own answers", false, oneDuration(false), (*Player).beBusy},
	{"busy-end", "", "waits for the end of the load; what went wrong with it is the livepatch's fault", false, nil, (*Player).busyEnd},
	{"leak-probe", "begin|again|end [CALLS]", "measures the kernel's memory before, between and after two equal rounds of at least CALLS calls each (150): what grows with the calls, in both rounds, is a leak", false,
		leakArgs, (*Player).leakProbe},
}

func matches(what, text string, c call) error {
	re, err := regexp.Compile("(?m)" + c.args[0])
	if err != nil {
		return err
	}
	if re.MatchString(text) == c.not {
		return lab.Failf("the %s %q does not match %q", what, shorten(text), map[bool]string{true: "!"}[c.not]+c.args[0])
	}
	return nil
}

// shorten keeps the end of a long text.
func shorten(text string) string {
	const limit = 1000
	text = strings.TrimSpace(text)
	if len(text) > limit {
		return "…" + strings.ToValidUTF8(text[len(text)-limit:], "")
	}
	return text
}

func (p *Player) run(ctx context.Context, c call) error {
	argv := append([]string{p.inGuest(c.args[0])}, c.args[1:]...)
	res, err := p.m.Run(ctx, lab.Command{Argv: argv, Timeout: p.Story.Limit})
	p.last = res
	if err != nil {
		return err
	}
	p.note = shorten(notes(string(res.Stdout)))
	said := shorten(string(res.Stderr))
	if said == "" {
		said = shorten(string(res.Stdout))
	}
	switch {
	case res.TimedOut:
		return lab.Failf("%s did not end within %s: %s", c.args[0], p.Story.Limit, said)
	case res.Exit == exitLab:
		return lab.Brokenf(errors.New(said), "%s says that the lab lacks something", c.args[0])
	case c.not && res.Exit == 0:
		return lab.Failf("%s ended with status 0, and must fail", c.args[0])
	case !c.not && res.Exit != 0:
		return lab.Failf("%s ended with status %d: %s", c.args[0], res.Exit, said)
	}
	return nil
}

// notes are what a program wants to be said in the result.
func notes(output string) string {
	var all []string
	for line := range strings.Lines(output) {
		if note, ok := strings.CutPrefix(strings.TrimSpace(line), "note: "); ok {
			all = append(all, note)
		}
	}
	return strings.Join(all, "; ")
}

// program is one that was started and goes on.
type program struct {
	name, pid, out string
}

// startScript leaves a program behind in a session of its own, its output in
// files, so that nobody waits for it.
const startScript = `out=$1; shift
setsid "$@" </dev/null >"$out.out" 2>"$out.err" &
echo $!`

func (p *Player) start(ctx context.Context, c call) error {
	pr := &program{name: path.Base(c.args[0]), out: fmt.Sprintf("/tmp/.story-%d", len(p.programs))}
	pid, err := p.output(ctx, append([]string{"sh", "-c", startScript, "start", pr.out, p.inGuest(c.args[0])}, c.args[1:]...)...)
	if err != nil {
		return err
	}
	if _, err := strconv.Atoi(pid); err != nil {
		return lab.Brokenf(err, "start %s", pr.name)
	}
	pr.pid = pid
	p.programs = append(p.programs, pr)
	p.note = "process " + pid
	return nil
}

// stopScript ends a session; what does not go by itself is killed.
const stopScript = `kill -TERM -"$1" 2>/dev/null
i=0
while kill -0 -"$1" 2>/dev/null; do
	i=$((i + 1))
	if [ $i = 50 ]; then kill -KILL -"$1" 2>/dev/null; fi
	if [ $i = 150 ]; then echo "process $1 does not end" >&2; exit 1; fi
	sleep 0.1
done
cat "$2.err" >&2
cat "$2.out"`

func (p *Player) stop(ctx context.Context, _ call) error {
	if len(p.programs) == 0 {
		return lab.Brokenf(errors.New("nothing was started"), "stop a program")
	}
	pr := p.programs[len(p.programs)-1]
	p.programs = p.programs[:len(p.programs)-1]
	res, err := p.m.Run(ctx, lab.Command{Argv: []string{"sh", "-c", stopScript, "stop", pr.pid, pr.out}, Timeout: time.Minute})
	p.last = res
	if err == nil && res.Exit != 0 {
		err = lab.Failf("%s: %s", pr.name, shorten(string(res.Stderr)))
	}
	return err
}

func (p *Player) beBusy(ctx context.Context, c call) error {
	d, err := duration(c, 0, 0)
	if err != nil {
		return err
	}
	if p.busy != nil {
		return lab.Brokenf(errors.New("it is busy already"), "put load on the machine")
	}
	worked := make(chan error, 1)
	go func() {
		res, err := p.m.Run(ctx, lab.Command{Argv: []string{guest.AgentName, guest.LoadArg, d.String()}, Timeout: 2*d + p.transition()})
		if err == nil && (res.Exit != 0 || res.TimedOut) {
			err = lab.Failf("work on the machine went wrong: %s", shorten(string(res.Stderr)))
		}
		worked <- err
	}()
	begin := time.NewTimer(time.Second)
	defer begin.Stop()
	select {
	case err := <-worked:
		if err == nil {
			err = lab.Brokenf(errors.New("it ended at once"), "put load on the machine")
		}
		return err
	case <-begin.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.busy = worked
	return nil
}

func (p *Player) busyEnd(_ context.Context, _ call) error {
	if p.busy == nil {
		return lab.Brokenf(errors.New("it is not busy"), "wait for the end of the load")
	}
	err := <-p.busy // ends with the context too
	p.busy = nil
	return err
}

var machineVerbs = []verb{
	{"reboot", "", "restarts the machine in an orderly way; no livepatch and no module is loaded then", false, nil, (*Player).reboot},
	{"console", "REGEXP", "the kernel's log since the story began has a line that matches; with `!` it has none", true, oneRegexp, (*Player).console},
	{"console-allow", "REGEXP", "trouble whose first line matches is expected; all other trouble in the log ends the story as `fail`", false, oneRegexp,
		func(p *Player, _ context.Context, c call) error {
			re, err := regexp.Compile(c.args[0])
			p.allow = append(p.allow, re)
			return err
		}},
	{"sleep", "TIME", "lets time go by", false, oneDuration(false), (*Player).sleep},
}

func (p *Player) sleep(ctx context.Context, c call) error {
	d, err := story.Duration(c.args[0], story.MaxTimeout)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return lab.Brokenf(context.Cause(ctx), "sleep")
	case <-time.After(d):
		return nil
	}
}

func (p *Player) console(_ context.Context, c call) error {
	text, err := p.m.Console()
	if err != nil {
		return err
	}
	re, err := regexp.Compile("(?m)" + c.args[0])
	if err != nil {
		return err
	}
	if re.MatchString(strings.TrimPrefix(text, p.before)) == c.not {
		return lab.Failf("the kernel's log does not match %q", map[bool]string{true: "!"}[c.not]+c.args[0])
	}
	return nil
}

// bootLine is the first of every kernel's log (init/main.c, linux_banner).
const bootLine = "Linux version "

// reboot also judges what came before it: the log of the new boot is the
// lab's until something is loaded again.
func (p *Player) reboot(ctx context.Context, _ call) error {
	if err := p.m.Reboot(ctx); err != nil {
		return err
	}
	text, err := p.m.Console()
	if err != nil {
		return err
	}
	since := strings.TrimPrefix(text, p.before)
	old, boot := since, ""
	if i := strings.LastIndex(since, bootLine); i >= 0 {
		i = strings.LastIndexByte(since[:i], '\n') + 1
		old, boot = since[:i], since[i:]
	}
	switch v, t := lab.JudgeTroubles(nil, p.troubles(old)); v {
	case lab.Pass:
	case lab.Broken:
		return lab.Brokenf(errors.New(t[0].Title), "have processors that run what is in memory")
	default:
		return lab.Failf("before the restart: %s", t[0].Title)
	}
	if t := lab.ScanConsole(boot); len(t) > 0 {
		p.before = text
		return lab.Brokenf(errors.New(t[0].Title), "boot without trouble")
	}
	p.present, p.programs, p.busy = nil, nil, nil
	return p.sameKernel(ctx)
}
