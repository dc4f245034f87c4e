// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/advice"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/wire"
)

// observation is what the agent has last seen of its machine. Loader is the
// last answer; LoaderErr says that it could not be asked this time.
type observation struct {
	Facts      wire.Facts
	FactsErr   error
	Kernels    facts.Kernels
	KernelsErr error
	In         []facts.Livepatch
	InErr      error
	Loader     *loaderapi.Status
	LoaderErr  error
	AnchorErr  error
	Operator   *Operator         // nil: the server chooses
	RolloutErr error             // why the operator's anchor is not believed
	KeyTrust   *bootkeys.Verdict // nil: no publisher is believed
	Halt       *Halt
	Publisher  string
	Profile    string

	firmware bootkeys.Firmware // what KeyTrust was judged by
}

// loaderPatience bounds one question that changes nothing. The loader does one
// request at a time and may be loading.
const loaderPatience = 20 * time.Second

// observe looks at everything anew.
func (a *Agent) observe(ctx context.Context) observation {
	var o observation
	a.mu.Lock()
	said := a.said
	a.mu.Unlock()
	o.Facts, o.FactsErr = a.cfg.Machine.Facts(a.cfg.Version)
	o.Kernels, o.KernelsErr = a.cfg.Machine.Kernels()
	o.In, o.InErr = a.cfg.Machine.Livepatches()
	if anchor, policy, err := a.trusted(); err != nil {
		o.AnchorErr, o.Halt = err, a.journal().Halt
	} else {
		o.judgeKeys(a.cfg.Machine, a.unrecalled(anchor))
		o.Publisher, o.Profile = anchor.Publisher, string(anchor.Profile)
		// A memory that cannot be read fails the check, which says why.
		o.Halt, _ = a.halted(policy)
	}
	op, err := a.operatorAnchor()
	if o.RolloutErr = err; op != nil {
		o.Operator = &Operator{op.Operator, op.Profile, a.cfg.Tier}
	}
	asking, cancel := context.WithTimeout(ctx, loaderPatience)
	defer cancel()
	st, err := a.cfg.Loader.Status(asking)

	a.mu.Lock()
	defer a.mu.Unlock()
	o.Loader, o.LoaderErr = a.seen.Loader, err
	switch {
	case said != a.said: // meanwhile it did something, and what it said then is newer
		o.LoaderErr, o.In, o.InErr = a.seen.LoaderErr, a.seen.In, a.seen.InErr
	case err == nil:
		o.Loader = &st
	}
	a.seen = o
	return o
}

// saw keeps what the loader said in passing.
func (a *Agent) saw(st loaderapi.Status) {
	in, err := a.cfg.Machine.Livepatches()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.said++
	a.seen.Loader, a.seen.LoaderErr = &st, nil
	a.seen.In, a.seen.InErr = in, err
}

// highest is the highest sequence ever confirmed on the running kernel build,
// as far as the loader could be asked.
func (o observation) highest() livepatch.Sequence {
	if o.Loader == nil {
		return 0
	}
	return o.Loader.Highest
}

// loaded is our livepatch in the kernel, by sysfs, or by the loader where
// sysfs could not be read. Two are there while one replaces the other; the
// newer counts.
func (o observation) loaded() (s livepatch.Sequence) {
	for _, lp := range o.In {
		if n, ours := livepatch.SequenceOf(lp.Name); ours && lp.Enabled {
			s = max(s, n)
		}
	}
	if o.InErr != nil && o.Loader != nil && o.Loader.Loaded != nil && o.Loader.Loaded.Enabled {
		s = o.Loader.Loaded.Sequence
	}
	return s
}

// floor is what a next livepatch must be higher than; the loader refuses any
// other.
func (o observation) floor() livepatch.Sequence { return max(o.loaded(), o.highest()) }

// stopped says why nothing may be loaded during this boot: somebody with
// rights on this machine said so. The loader would refuse.
func (o observation) stopped(j journal) (fault.Code, string) {
	if st := o.Loader; st != nil {
		switch {
		case st.Boot.Outcome == "off_parameter":
			return "off_parameter", "the kernel was booted with klatch=off"
		case st.Disabled:
			return "until_reboot", "root took the livepatch out until the next reboot"
		case slices.Contains(st.Boot.Stops, "flag"):
			return "off_flag", "the flag file /etc/klatch/off is there"
		}
	}
	for _, b := range j.Blocked {
		if b.Code == codeTakenOut && b.BootID == o.Facts.BootID && o.loaded() == 0 {
			return "until_reboot", b.Text
		}
	}
	return "", ""
}

// notBack says why the confirmed livepatch was not put back at boot.
func (o observation) notBack(j journal) (word string, reason fault.Code, text string) {
	if o.loaded() != 0 {
		return "", "", ""
	}
	switch code, text := o.stopped(j); {
	case code == "until_reboot":
		return "disabled", code, text
	case code != "":
		return "boot_stopped", code, text
	case o.Loader == nil || o.highest() == 0:
		return "", "", ""
	}
	switch b := o.Loader.Boot; b.Outcome {
	case "off_breaker":
		return "boot_stopped", "off_breaker", fmt.Sprintf("the machine died too often after livepatch %d was loaded at boot", o.highest())
	case "off_flag":
		return "boot_stopped", "off_flag", "the flag file /etc/klatch/off was there at boot"
	case "off_disabled":
		return "disabled", "until_reboot", "root took the livepatch out until the next reboot"
	case "failed":
		return "failed", cmp.Or(b.Code, "boot_failed"), "loading at boot: " + b.Text
	}
	return "", "", ""
}

// codeTakenOut is the code of a livepatch that somebody has taken out by hand.
const codeTakenOut fault.Code = "taken_out"

// wakeUp is the first look after a start. If the machine was booted since the
// journal was written, it decides what that means for the livepatch under way.
// It is false where the machine could not even be identified.
func (a *Agent) wakeUp(ctx context.Context) (bool, error) {
	o := a.observe(ctx)
	j := a.journal()
	if o.FactsErr != nil {
		a.log.LogAttrs(ctx, slog.LevelError, "machine not understood", slog.String("err", o.FactsErr.Error()))
		return false, nil //nolint:nilerr // it is in the log, and looked at again
	}
	orderly := j.Orderly == j.Seen
	if j.Seen != o.Facts.BootID {
		if err := a.booted(o); err != nil {
			return false, err
		}
	}
	if j.Phase != wire.Idle && j.BootID != o.Facts.BootID {
		if err := a.carryOn(o, orderly); err != nil {
			return false, err
		}
	}
	if j.Orderly != "" {
		return true, a.update(func(j *journal) { j.Orderly = "" })
	}
	return true, nil
}

// booted tells of a new boot, and forgets what counted only for the old one.
func (a *Agent) booted(o observation) error {
	n := note{event: wire.EventBooted, sequence: o.loaded()}
	if o.Loader != nil {
		n.code, n.text = fault.Code(o.Loader.Boot.Outcome), o.Loader.Boot.Text
	}
	boot := o.Facts.BootID
	now := time.Now().UTC()
	return a.update(func(j *journal) {
		j.Step++
		j.Seen = boot
		j.Blocked = slices.DeleteFunc(j.Blocked, func(b blocked) bool { return b.Code == codeTakenOut })
		a.tell(j, now, []note{n})
	})
}

// carryOn goes on with a livepatch that was under way in another boot.
func (a *Agent) carryOn(o observation, orderly bool) error {
	j := a.journal()
	w := *j.Work
	in := o.loaded() == w.Sequence
	switch {
	case j.Phase == wire.Confirmed, j.Phase == wire.Suspect, j.Phase == wire.Failed:
		return nil // finish is safe in any boot
	case w.Kernel.ID != o.Facts.Kernel.ID:
		if j.Phase == wire.Stalled {
			if err := a.move(wire.Staged, nil); err != nil {
				return err
			}
		}
		return a.move(wire.Idle, nil)
	case j.Phase == wire.Staged, j.Phase == wire.Stalled:
		return a.update(func(j *journal) { j.BootID = o.Facts.BootID })
	case in && j.Phase == wire.Transitioning:
		return a.update(func(j *journal) { j.BootID = o.Facts.BootID; a.begin(j.Work) })
	case in:
		return a.move(wire.Transitioning, func(j *journal) { j.Work.AtBoot = true; a.begin(j.Work) })
	case orderly && w.Module.Name != "":
		return a.move(wire.Staged, func(j *journal) { j.Work.AtBoot = false; j.Work.Cancel = false })
	}
	text := fmt.Sprintf("the machine died while livepatch %d was not confirmed yet", w.Sequence)
	return a.fail("died", text)
}

// begin notes the state of the kernel before a load.
func (a *Agent) begin(w *work) {
	w.Began = time.Now().UTC()
	w.Marks = a.cfg.Machine.Marks()
	w.Cancel, w.Code, w.Text = false, "", ""
	w.Blocking, w.Counts = nil, nil
}

// isBlocked finds the record of a livepatch that is not tried again.
func (j journal) isBlocked(id kernel.BuildID, s livepatch.Sequence) (blocked, bool) {
	i := slices.IndexFunc(j.Blocked, func(b blocked) bool { return b.Kernel == id && b.Sequence == s })
	if i < 0 {
		return blocked{}, false
	}
	return j.Blocked[i], true
}

// advice is about the reboot, from what was observed and told.
func (in inputs) advice() advice.Advice {
	o, j := in.o, in.j
	f := advice.Facts{
		Notice: in.notice, Now: in.now,
		Running: o.Facts.Kernel.Release, Newer: o.Kernels.Newer(o.Facts.Kernel.Release), Loaded: o.loaded(),
		// Where not even the running kernel's image is found, /boot may be
		// another file system that is not mounted.
		KernelsUnknown: o.KernelsErr != nil || o.FactsErr != nil || !slices.Contains(o.Kernels, o.Facts.Kernel.Release),
	}
	if b, ok := j.isBlocked(o.Facts.Kernel.ID, o.loaded()); ok && b.Phase == wire.Suspect {
		f.Suspect = b.Sequence
	}
	code, _ := o.stopped(j)
	f.Disabled = code == "until_reboot"
	return advice.Of(f)
}
