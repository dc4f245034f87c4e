// SPDX-License-Identifier: Apache-2.0

package player

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/guest"
	"klatch/internal/livepatch"
	"klatch/internal/stall"
	"klatch/internal/tracer"
)

var obstacleVerbs = []verb{
	{"trace", "kprobe|fentry|fexit [FUNCTION]", "attaches a kprobe or a BPF program to a function of the kernel itself; without FUNCTION to the first that the livepatch replaces and that can be traced so, and if there is none this is noted", false,
		traceArgs, (*Player).trace},
	{"trace-end", "", "takes it away again", false, nil, (*Player).traceEnd},
	{"expect-tracer", "KIND EFFECT", "on the function of `trace` is found, as a machine finds it before it loads, exactly this: kprobe, bpf or ftrace; refused, silent, sleepers or both_work", false, tracerArgs, (*Player).expectTracer},
	{"sleeper", "begin|end", "begins a task that sleeps in `kernel_clone`, where no signal but the last one wakes it; ends it", false,
		oneOf(false, "begin", "end"), (*Player).sleeper},
	{"expect-stall", "CLASS[,CLASS...] [FUNCTION]", "the transition that runs is held up, and by nobody but tasks of these classes; FUNCTION is on the stack of each", false, stallArgs, (*Player).expectStall},
}

func traceArgs(args []string) error {
	if len(args) < 1 || len(args) > 2 || !slices.Contains([]string{"kprobe", "fentry", "fexit"}, args[0]) {
		return errors.New("want kprobe, fentry or fexit, and perhaps a function")
	}
	return nil
}

func tracerArgs(args []string) error {
	if len(args) != 2 || !slices.Contains([]tracer.Kind{tracer.Kprobe, tracer.BPF, tracer.Ftrace}, tracer.Kind(args[0])) ||
		!slices.Contains([]tracer.Effect{tracer.Refused, tracer.Silent, tracer.Sleepers, tracer.Both}, tracer.Effect(args[1])) {
		return errors.New("want a kind and an effect of docs/explanation/stalls.md")
	}
	return nil
}

func stallArgs(args []string) error {
	if len(args) < 1 || len(args) > 2 || slices.ContainsFunc(strings.Split(args[0], ","), func(c string) bool { return !slices.Contains(stall.Classes, stall.Class(c)) }) {
		return fmt.Errorf("want some of %q, and perhaps a function", stall.Classes)
	}
	return nil
}

// traceable are the replaced functions of the kernel itself that may have type
// information: a dot means that the compiler changed the arguments.
func (s Subject) traceable() (names []string) {
	for _, f := range s.Built.Functions {
		if f.Object == "vmlinux" && !strings.Contains(f.Name, ".") {
			names = append(names, f.Name)
		}
	}
	return names
}

// hasBTF says whether the kernel carries type information (include/asm-generic/
// vmlinux.lds.h, BTF). A table that cannot be read says nothing.
func (t Tables) hasBTF() (bool, error) {
	f, err := os.Open(t.Vmlinux)
	if err != nil {
		return false, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	b, err := durable.ReadLimited(f, "symbol table", maxSymbols)
	return err == nil && strings.Contains(string(b), " __start_BTF"), err
}

// Where a tracer of a story leaves what it counted.
const traceFile = "/tmp/.story-trace"

// traceScript starts a BPF program in a session of its own and waits until it
// is attached. Its process id is in a file.
const traceScript = `rm -f "$4"
setsid /proc/1/exe "$1" "$2" "$3" "$4" </dev/null >/dev/null 2>"$4.err" &
echo $! > "$4.pid"
i=0
until [ -f "$4" ]; do
	if ! kill -0 $! 2>/dev/null; then cat "$4.err" >&2; exit 1; fi
	i=$((i + 1))
	if [ $i = 600 ]; then kill -KILL $!; echo "not attached within a minute" >&2; exit 1; fi
	sleep 0.1
done`

const (
	kprobeScript = `cd /sys/kernel/tracing && echo "p:klatch/story $1" >> kprobe_events && echo 1 > events/klatch/story/enable`
	traceEnd     = `if [ -f "$1.pid" ]; then kill -KILL $(cat "$1.pid"); rm -f "$1" "$1.pid"; fi
cd /sys/kernel/tracing || exit 1
if [ -d events/klatch/story ]; then echo 0 > events/klatch/story/enable && echo -:klatch/story >> kprobe_events; fi`
)

func (p *Player) trace(ctx context.Context, c call) error {
	p.untraced = false
	if p.traced != "" {
		return lab.Brokenf(fmt.Errorf("%s is traced already", p.traced), "trace")
	}
	names := p.traceable()
	if len(c.args) > 1 {
		names = c.args[1:]
	}
	var why []string
	for _, name := range names {
		argv := []string{"sh", "-c", kprobeScript, "trace", name}
		if c.args[0] != "kprobe" {
			argv = []string{"sh", "-c", traceScript, "trace", guest.TraceArg, c.args[0], name, traceFile}
		}
		res, err := p.m.Run(ctx, lab.Command{Argv: argv, Timeout: 90 * time.Second})
		if err != nil {
			return err
		}
		switch {
		case res.TimedOut:
			return lab.Brokenf(errors.New("it did not end in time"), "attach %s to %s", c.args[0], name)
		case res.Exit == 0:
			p.traced, p.note = name, c.args[0]+" on "+name
			return nil
		}
		why = append(why, shorten(string(res.Stderr)))
	}
	if len(c.args) == 1 { // the compiler leaves type information of some functions out
		p.untraced, p.note = true, "nothing is attached: "+shorten(strings.Join(why, "; "))
		return nil
	}
	return lab.Brokenf(errors.New(strings.Join(why, "; ")), "attach %s to one of %q", c.args[0], names)
}

func (p *Player) traceEnd(ctx context.Context, _ call) error {
	p.traced, p.untraced = "", false
	_, err := p.output(ctx, "sh", "-c", traceEnd, "trace-end", traceFile)
	return err
}

func (p *Player) expectTracer(ctx context.Context, c call) error {
	if p.untraced {
		p.note = "nothing is attached"
		return nil
	}
	if p.traced == "" {
		return lab.Brokenf(errors.New("nothing is traced"), "look for a tracer")
	}
	in, err := p.livepatches(ctx)
	if err != nil {
		return err
	}
	var already []livepatch.Function
	if len(in) > 0 {
		already = p.Built.Functions
	}
	found, err := lab.Tracers(ctx, p.m, []livepatch.Function{{Object: "vmlinux", Name: p.traced}}, already)
	if err != nil {
		return err
	}
	if len(found) != 1 || string(found[0].Kind) != c.args[0] || string(found[0].Effect) != c.args[1] {
		return lab.Brokenf(fmt.Errorf("found %q", found), "find %s with effect %s on %s", c.args[0], c.args[1], p.traced)
	}
	p.note = found[0].String()
	return nil
}

const (
	sleeperFile = "/tmp/.story-sleeper"
	sleeperGo   = `setsid /proc/1/exe "$1" </dev/null >/dev/null 2>"$2.err" &
echo $! > "$2.pid"
i=0
until grep -q kernel_clone /proc/$!/task/*/stack 2>/dev/null; do
	if ! kill -0 $! 2>/dev/null; then cat "$2.err" >&2; exit 1; fi
	i=$((i + 1))
	if [ $i = 300 ]; then kill -KILL -$!; echo "does not sleep within half a minute" >&2; exit 1; fi
	sleep 0.1
done`
	sleeperEnd = `kill -KILL -$(cat "$1.pid")`
)

func (p *Player) sleeper(ctx context.Context, c call) error {
	argv := []string{"sh", "-c", sleeperGo, "sleeper", guest.WaitArg, sleeperFile}
	if c.args[0] == "end" {
		argv = []string{"sh", "-c", sleeperEnd, "sleeper", sleeperFile}
	}
	res, err := p.m.Run(ctx, lab.Command{Argv: argv})
	if err == nil && res.Exit != 0 {
		err = lab.Brokenf(errors.New(shorten(string(res.Stderr))), "sleeper %s", c.args[0])
	}
	return err
}

// stallLimit is how long a stall may take to be one: until then tasks are
// moved that only had no turn yet.
const stallLimit = 60 * time.Second

func (p *Player) expectStall(ctx context.Context, c call) error {
	classes, function := strings.Split(c.args[0], ","), ""
	if len(c.args) > 1 {
		function = c.args[1]
	}
	names, err := p.livepatches(ctx)
	if err != nil {
		return err
	}
	var last []stall.Blocked
	err = p.await(ctx, stallLimit, "stall of class "+c.args[0], func(ctx context.Context) (bool, error) {
		last = nil
		for _, name := range names {
			bs, err := lab.Blockers(ctx, p.m, name, p.Built.Functions)
			if err != nil {
				return false, err
			}
			last = append(last, bs...)
		}
		if len(last) == 0 {
			return false, lab.Failf("no task holds the transition up")
		}
		return !slices.ContainsFunc(last, func(b stall.Blocked) bool {
			on := func(f stall.Frame) bool { return function == "" || f.Symbol == function }
			return !slices.Contains(classes, string(b.Class)) || !slices.ContainsFunc(b.Stack, on)
		}), nil
	})
	var lines []string
	for _, b := range last {
		lines = append(lines, b.String())
	}
	if err != nil {
		return fmt.Errorf("%w; blocked by %s", err, shorten(strings.Join(lines, "; ")))
	}
	p.note = strings.Join(lines, "; ")
	return nil
}
