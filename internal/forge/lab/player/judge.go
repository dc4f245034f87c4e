// SPDX-License-Identifier: Apache-2.0

package player

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/kernel"
)

// begin looks whether the machine is the one that was asked for, before
// anything of the livepatch is on it: what is wrong now is the lab's.
func (p *Player) begin(ctx context.Context) error {
	text, err := p.m.Console()
	if err != nil {
		return err
	}
	p.before = text
	if t := lab.ScanConsole(text); len(t) > 0 {
		return lab.Brokenf(errors.New(t[0].Title), "boot without trouble")
	}
	return p.sameKernel(ctx)
}

// readings is one look at the guest: its kernel, its two clocks and its taint.
const readings = "uname -r; cut -d' ' -f1 /proc/uptime; date +%s; cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/tainted /sys/kernel/notes"

// Taints that come with a livepatch: a module that was not built with the
// kernel, without a signature that it knows, which is a livepatch
// (Documentation/admin-guide/tainted-kernels.rst, bits 12, 13 and 15).
const expectedTaint = 1<<12 | 1<<13 | 1<<15

// sameKernel refuses a machine that runs another kernel build, and starts the
// watch over its clocks.
func (p *Player) sameKernel(ctx context.Context) error {
	release, notes, c, err := p.look(ctx)
	if err != nil {
		return err
	}
	if release != string(p.Built.Kernel) {
		return lab.Brokenf(fmt.Errorf("it runs %q", release), "boot kernel %s", p.Built.Kernel)
	}
	id, err := kernel.ParseNotes(notes)
	if err != nil {
		return lab.Brokenf(err, "read the kernel's build id")
	}
	if id != p.Built.BuildID {
		return lab.Brokenf(fmt.Errorf("it runs build %s", id), "boot kernel %s, build %s", p.Built.Kernel, p.Built.BuildID)
	}
	p.clock = c
	return nil
}

func (p *Player) look(ctx context.Context) (release string, notes []byte, c clock, err error) {
	c = clock{host: time.Now()}
	res, err := p.m.Run(ctx, lab.Command{Argv: []string{"sh", "-c", readings}})
	if err != nil {
		return "", nil, c, err
	}
	parts := bytes.SplitN(res.Stdout, []byte{'\n'}, 6)
	if res.Exit != 0 || len(parts) != 6 {
		return "", nil, c, lab.Brokenf(fmt.Errorf("exit status %d: %q", res.Exit, res.Stderr), "look at the guest")
	}
	up, err1 := strconv.ParseFloat(string(parts[1]), 64)
	wall, err2 := strconv.ParseInt(string(parts[2]), 10, 64)
	taint, err3 := strconv.ParseUint(string(parts[4]), 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return "", nil, c, lab.Brokenf(err, "read the guest's clocks and taint")
	}
	c.taint, c.bootID = taint, string(parts[3])
	c.up, c.wall = time.Duration(up*float64(time.Second)), time.Duration(wall)*time.Second
	return string(parts[0]), parts[5], c, nil
}

// clock is one reading of the guest's clocks beside ours, and of its taint.
type clock struct {
	bootID   string
	host     time.Time
	up, wall time.Duration
	taint    uint64
}

// Limits of what clocks may differ by. The guest's two move together; that of
// an emulated guest follows the host's a little late.
const (
	maxSet   = 5 * time.Second
	maxDrift = 20 * time.Second
)

// jumped says what is wrong with the guest's clocks since c. A machine whose
// time jumps, or that stood still, tells nothing about a livepatch: time
// limits in the kernel and in programs ran out for another reason.
func (c clock) jumped(now clock) error {
	if c.host.IsZero() || c.bootID != now.bootID {
		return nil
	}
	up, wall, host := now.up-c.up, now.wall-c.wall, now.host.Sub(c.host)
	if d := (wall - up).Abs(); d > maxSet {
		return fmt.Errorf("the guest's clock jumped by %s", d.Round(time.Second))
	}
	if d := (host - up).Abs(); d > maxDrift+host/5 {
		return fmt.Errorf("the guest counted %s while %s went by", up.Round(time.Second), host.Round(time.Second))
	}
	return nil
}

// clockLimit bounds the last look at the clocks of a machine that may be dead.
const clockLimit = 30 * time.Second

// judge decides. A clock that jumped outweighs even trouble on the console: a
// kernel whose time jumps complains of stalls that are none.
func (p *Player) judge(ctx context.Context, err error, out *Outcome) {
	text, cerr := p.m.Console()
	if cerr != nil {
		err = errors.Join(err, cerr)
	}
	var whole bool
	if out.Console, whole = strings.CutPrefix(text, p.before); !whole {
		err = errors.Join(err, lab.Brokenf(errors.New("its beginning is lost: the kernel printed too much"), "keep the console"))
	}
	out.Verdict, out.Trouble = lab.JudgeTroubles(err, p.troubles(out.Console))
	switch {
	case out.Verdict == lab.Broken && len(out.Trouble) > 0:
		out.Why = "the emulated processor stumbled by itself: " + out.Trouble[0].Title
	case err != nil && out.Verdict == lab.Broken:
		out.Why = err.Error()
	case len(out.Trouble) > 0:
		out.Why = out.Trouble[0].Title
		if _, ok := errors.AsType[*lab.FailError](err); ok {
			out.Why += "; " + err.Error()
		}
	case err != nil:
		out.Why = err.Error()
	}
	if p.clock.host.IsZero() || out.Verdict == lab.Broken {
		return // not begun, or nothing to add
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clockLimit)
	defer cancel()
	_, _, now, lookErr := p.look(ctx)
	switch {
	case lookErr == nil && now.bootID != p.clock.bootID:
		if out.Verdict == lab.Pass { // a machine that resets says nothing, and comes again
			out.Verdict, out.Why = lab.Fail, "the machine restarted by itself"
		}
		return
	case lookErr == nil:
		lookErr = lab.Brokenf(p.clock.jumped(now), "keep time")
	case out.Verdict == lab.Fail:
		return // dead of what the console or the check says
	}
	if lookErr != nil {
		out.Verdict, out.Why = lab.Broken, lookErr.Error()
		return
	}
	// A story that expects a warning expects its taint.
	if more := now.taint &^ (p.clock.taint | expectedTaint); more != 0 && out.Verdict == lab.Pass && len(p.allow) == 0 {
		out.Verdict, out.Why = lab.Fail, fmt.Sprintf("the kernel is tainted by more than a livepatch: %#x", more)
	}
}

// troubles finds what the kernel complained about and the story does not
// expect.
func (p *Player) troubles(console string) []lab.Trouble {
	return slices.DeleteFunc(lab.ScanConsole(console), func(t lab.Trouble) bool {
		return slices.ContainsFunc(p.allow, func(re *regexp.Regexp) bool { return re.MatchString(t.Title) })
	})
}
