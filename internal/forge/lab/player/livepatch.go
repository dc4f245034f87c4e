// SPDX-License-Identifier: Apache-2.0

package player

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/forge/lab"
)

// Exit statuses of a check program.
const (
	checkFixed = 0
	checkFlaw  = 1
)

// transitionLimit is how long a transition on an idle guest may take. The
// kernel looks once a second and signals after 15 s (kernel/livepatch/
// transition.c, SIGNALS_TIMEOUT); emulation is slow.
const transitionLimit = 45 * time.Second

// perFunction is added for each replaced function. For every task the kernel
// compares each entry of its stack with all of them (klp_check_stack); and it
// takes them back one by one, each with a wait for all tasks (ftrace_shutdown
// in kernel/trace/ftrace.c), while the write that asked for it blocks. 306
// functions took 53 s and 396 took 79 s on machines whose host was busy.
const perFunction = 250 * time.Millisecond

// transition is how long a transition of the livepatch may take.
func (p *Player) transition() time.Duration {
	return transitionLimit + time.Duration(len(p.Built.Functions))*perFunction
}

// insertLimit is how long the kernel may take to insert a module. One of 200
// functions takes over a minute on a busy emulated machine.
const insertLimit = 5 * time.Minute

// Limits of "check", in calls, and of one call.
const (
	maxCalls  = 100_000
	callLimit = 30 * time.Second
)

// livepatchDir has a folder for each livepatch in the kernel (Documentation/
// ABI/testing/sysfs-kernel-livepatch).
const livepatchDir = "/sys/kernel/livepatch/"

var livepatchVerbs = []verb{
	{"load", "[this|earlier|FILE.ko]", "inserts the livepatch (or an earlier sequence, or a module of the story); does not wait for its transition. `! load`: the kernel must refuse it", true,
		count(0, 1), (*Player).load},
	{"await-transition", "[LIMIT]", "waits until the transition of the newest livepatch is over (45s, and 0.25s for each replaced function) and looks that it is enabled", false, oneDuration(true), (*Player).awaitTransition},
	{"load-and-cancel", "", "inserts the livepatch and cancels it half-way, in one go, so that its transition is not over; up to eight times, as it may be over early", false, nil, (*Player).loadAndCancel},
	{"cancel", "", "reverses a transition that has not finished, and waits until the livepatch is out", false, nil, (*Player).cancel},
	{"disable", "[this|earlier]", "takes the livepatch out and waits until it is", false, oneOf(true, "this", "earlier"), (*Player).disable},
	{"unload", "[this|earlier]", "removes the module. `! unload`: the kernel must refuse it", true, oneOf(true, "this", "earlier"), (*Player).unload},
	{"loaded", "this|earlier|none", "exactly this livepatch is in the kernel, or none", false, oneOf(false, "this", "earlier", "none"), (*Player).loaded},
	{"check", "flaw|fixed [CALLS]", "runs the check of each fix that has one, CALLS times; all must say that the flaw shows, or that it is gone", false, checkArgs, (*Player).check},
	{"same-kernel", "", "the machine runs the release and the build that the livepatch is for; every story begins with it unasked", false, nil,
		func(p *Player, ctx context.Context, _ call) error { return p.sameKernel(ctx) }},
	{"symbols", "", "the kernel's own symbols are where the builder's tables say", false, nil, (*Player).symbols},
	{"positions", "", "the kernel replaced exactly the built functions, each at its position among those of one name", false, nil, (*Player).positions},
	{"patched", "", "every loaded module of which the livepatch replaces functions is under it", false, nil, func(p *Player, ctx context.Context, _ call) error { return p.patched(ctx) }},
	{"module", "load|unload|again", "loads the modules that the livepatch reaches, with what they need; takes them out; or both. One that does not load in the lab is noted", false,
		oneOf(false, "load", "unload", "again"), (*Player).module},
}

func checkArgs(args []string) error {
	if len(args) == 0 || len(args) > 2 || args[0] != "flaw" && args[0] != "fixed" {
		return errors.New("want flaw or fixed, and perhaps how often")
	}
	if len(args) == 2 {
		return oneCount(args[1])
	}
	return nil
}

// oneCount checks a number of calls, unless a variable will be it.
func oneCount(arg string) error {
	if strings.Contains(arg, "${") {
		return nil
	}
	_, err := positive(arg, maxCalls)
	return err
}

// target is the module that a word means.
func (p *Player) target(word string) (name, file string, err error) {
	switch word {
	case "this":
		return p.Built.Sequence.ModuleName(), moduleFile(p.Built), nil
	case "earlier":
		e := p.earlier()
		if e == nil {
			return "", "", lab.Brokenf(errors.New("there is none: the story should say needs: earlier"), "find an earlier sequence")
		}
		return e.Sequence.ModuleName(), moduleFile(*e), nil
	}
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(word), ".ko"), "-", "_"), word, nil
}

// insert runs insmod; what the kernel says against it comes back as refused.
func (p *Player) insert(ctx context.Context, file string) (refused error, err error) {
	res, err := p.m.Run(ctx, lab.Command{Argv: []string{"insmod", lab.FilesDir + "/" + file}, Timeout: insertLimit})
	switch {
	case err != nil:
		return nil, err
	case res.TimedOut:
		return nil, lab.Failf("load %s: it did not end within %s", file, insertLimit)
	case res.Exit != 0:
		return lab.Failf("load %s: %s", file, shorten(string(res.Stderr))), nil
	}
	return nil, nil
}

func (p *Player) load(ctx context.Context, c call) error {
	_, file, err := p.target(c.arg(0, "this"))
	if err != nil {
		return err
	}
	refused, err := p.insert(ctx, file)
	switch {
	case err != nil || c.not && refused != nil:
		return err
	case c.not:
		return lab.Failf("the kernel took %s, which it must refuse", file)
	}
	return refused
}

// awaitTransition waits for whatever transition runs: the kernel allows one.
func (p *Player) awaitTransition(ctx context.Context, c call) error {
	limit, err := duration(c, 0, p.transition())
	if err != nil {
		return err
	}
	names, err := p.livepatches(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		dir := livepatchDir + name
		// A livepatch that is being replaced is gone at the end.
		if err := p.await(ctx, limit, "transition of "+name, func(ctx context.Context) (bool, error) {
			res, err := p.m.Run(ctx, lab.Command{Argv: []string{"cat", dir + "/transition"}})
			return err == nil && (res.Exit != 0 || strings.TrimSpace(string(res.Stdout)) == "0"), err
		}); err != nil {
			return err
		}
	}
	names, err = p.livepatches(ctx)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return lab.Failf("no livepatch is in the kernel after the transition")
	}
	for _, name := range names {
		out, err := p.output(ctx, "cat", livepatchDir+name+"/enabled")
		if err != nil {
			return err
		}
		if out != "1" {
			return lab.Failf("%s is not enabled after its transition: %q", name, out)
		}
	}
	return nil
}

// livepatches lists what is in the kernel.
func (p *Player) livepatches(ctx context.Context) ([]string, error) {
	out, err := p.output(ctx, "ls", livepatchDir)
	names := strings.Fields(out)
	slices.Sort(names)
	return names, err
}

// cancelScript inserts and reverses without a pause: under emulation a
// transition takes a second, and one question and answer a tenth of it.
// Status 9 says that the transition was over.
const cancelScript = `insmod "$1" || exit 1
d=/sys/kernel/livepatch/$2
[ "$(cat $d/transition)" = 1 ] || exit 9
echo 0 > $d/enabled
cat $d/transition 2>/dev/null || true`

const cancelTries = 8

func (p *Player) loadAndCancel(ctx context.Context, _ call) error {
	name, file, err := p.target("this")
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		res, err := p.m.Run(ctx, lab.Command{Argv: []string{"sh", "-c", cancelScript, "cancel", lab.FilesDir + "/" + file, name}, Timeout: insertLimit + p.transition()})
		switch {
		case err != nil:
			return err
		case res.TimedOut:
			return lab.Failf("load and cancel %s: it did not end within %s", file, insertLimit+p.transition())
		}
		switch res.Exit {
		case 0:
			p.note = fmt.Sprintf("canceled at try %d", try)
			return p.awaitGone(ctx, name)
		case 9:
			if err := p.takeOut(ctx, name); err != nil {
				return err
			}
			if try == cancelTries {
				return lab.Brokenf(fmt.Errorf("each of %d transitions was over before it could be canceled", try), "cancel half-way")
			}
		default:
			return lab.Failf("load %s: %s", file, shorten(string(res.Stderr)))
		}
	}
}

// takeOut disables and unloads a livepatch.
func (p *Player) takeOut(ctx context.Context, name string) error {
	if err := p.takeBack(ctx, name); err != nil {
		return err
	}
	_, err := p.output(ctx, "rmmod", name)
	return err
}

func (p *Player) cancel(ctx context.Context, _ call) error {
	names, err := p.livepatches(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		out, err := p.output(ctx, "cat", livepatchDir+name+"/transition")
		if err != nil {
			return err
		}
		if out != "1" {
			continue
		}
		return p.takeBack(ctx, name)
	}
	return lab.Failf("there is no transition to cancel: the kernel has %q", names)
}

func (p *Player) disable(ctx context.Context, c call) error {
	name, _, err := p.target(c.arg(0, "this"))
	if err != nil {
		return err
	}
	return p.takeBack(ctx, name)
}

// takeBack asks the kernel for the old functions and waits until it has them.
func (p *Player) takeBack(ctx context.Context, name string) error {
	off := lab.Command{Argv: []string{"sh", "-c", "echo 0 > " + livepatchDir + name + "/enabled"}, Timeout: p.transition()}
	if _, err := p.ran(ctx, off); err != nil {
		return err
	}
	return p.awaitGone(ctx, name)
}

// awaitGone waits until a livepatch is out of the kernel.
func (p *Player) awaitGone(ctx context.Context, name string) error {
	return p.await(ctx, p.transition(), "end of "+name, func(ctx context.Context) (bool, error) {
		names, err := p.livepatches(ctx)
		return !slices.Contains(names, name), err
	})
}

func (p *Player) unload(ctx context.Context, c call) error {
	name, _, err := p.target(c.arg(0, "this"))
	if err != nil {
		return err
	}
	res, err := p.m.Run(ctx, lab.Command{Argv: []string{"rmmod", name}})
	switch {
	case err != nil:
		return err
	case c.not && res.Exit == 0:
		return lab.Failf("the kernel unloaded %s, which it must refuse", name)
	case !c.not && res.Exit != 0:
		return lab.Failf("unload %s: %s", name, shorten(string(res.Stderr)))
	}
	return nil
}

func (p *Player) loaded(ctx context.Context, c call) error {
	var want []string
	if c.args[0] != "none" {
		name, _, err := p.target(c.args[0])
		if err != nil {
			return err
		}
		want = []string{name}
	}
	names, err := p.livepatches(ctx)
	if err != nil {
		return err
	}
	if !slices.Equal(names, want) {
		return lab.Failf("the kernel has %q, want %q", names, want)
	}
	return nil
}

func (p Play) hasCheck(id cve.ID) bool { return p.Checks[id] != nil }

// check runs every check and wants the same answer from all, each time.
func (p *Player) check(ctx context.Context, c call) error {
	want, calls := checkFlaw, 1
	if c.args[0] == "fixed" {
		want = checkFixed
	}
	if len(c.args) > 1 {
		var err error
		if calls, err = positive(c.args[1], maxCalls); err != nil {
			return err
		}
	}
	done := 0
	for _, id := range p.Built.Fixes {
		if !p.hasCheck(id) {
			continue
		}
		if err := p.checkOne(ctx, id, want, calls); err != nil {
			return err
		}
		done++
	}
	p.note = fmt.Sprintf("%d checks, %d calls each", done, calls)
	p.flawSeen = p.flawSeen || done > 0 && want == checkFlaw
	p.fixedSeen = p.fixedSeen || done > 0 && p.flawSeen && want == checkFixed
	return nil
}

// callScript calls a check again and again until one answers otherwise.
const callScript = `i=0
while [ $i -lt $2 ]; do
	out=$("$1" 2>&1); s=$?
	if [ $s != $3 ]; then echo "$out" >&2; exit $s; fi
	i=$((i + 1))
done
exit $3`

func (p *Player) checkOne(ctx context.Context, id cve.ID, want, calls int) error {
	argv := []string{lab.FilesDir + "/" + checkFile(id)}
	limit := callLimit
	if calls > 1 {
		argv = []string{"sh", "-c", callScript, "check", argv[0], strconv.Itoa(calls), strconv.Itoa(want)}
		limit += time.Duration(calls) * time.Second
	}
	res, err := p.m.Run(ctx, lab.Command{Argv: argv, Timeout: limit})
	if err != nil {
		return err
	}
	said := shorten(string(res.Stdout) + string(res.Stderr))
	switch {
	case res.TimedOut:
		return lab.Failf("check of %s did not end in time: %s", id, said)
	case res.Exit == want:
		return nil
	case res.Exit == checkFlaw:
		return lab.Failf("the flaw %s still shows: %s", id, said)
	case res.Exit == checkFixed:
		return lab.Failf("the flaw %s does not show on the unpatched kernel, so its check proves nothing: %s", id, said)
	default:
		return lab.Failf("check of %s could not find out (exit status %d): %s", id, res.Exit, said)
	}
}

// await polls until it is so. The limit is of the guest's time: a machine
// that stands still is not a livepatch that takes long.
func (p *Player) await(ctx context.Context, limit time.Duration, what string, so func(context.Context) (bool, error)) error {
	first := -1.0
	for {
		ok, err := so(ctx)
		if err != nil || ok {
			return err
		}
		out, err := p.output(ctx, "cut", "-d", " ", "-f", "1", "/proc/uptime")
		if err != nil {
			return err
		}
		up, err := strconv.ParseFloat(out, 64)
		if err != nil {
			return lab.Brokenf(err, "read the guest's uptime")
		}
		if first < 0 {
			first = up
		}
		if up-first > limit.Seconds() {
			return lab.Failf("%s did not come within %s", what, limit)
		}
		select {
		case <-ctx.Done():
			return lab.Brokenf(context.Cause(ctx), "wait for %s", what)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
