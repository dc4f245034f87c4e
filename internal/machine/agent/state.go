// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/advice"
	"klatch/internal/notice"
	"klatch/internal/wire"
)

// inputs is what a state is made of; describe is pure.
type inputs struct {
	j        journal
	o        observation
	enrolled bool
	policy   Policy
	now      time.Time
	notice   *notice.Notice // on the running kernel build; nil: nothing is known
}

// inputs gathers them. The caller holds the lock.
func (a *Agent) inputs(j journal, now time.Time) inputs {
	_, enrolled := a.cfg.Server.Identity()
	return inputs{j: j, o: a.seen, enrolled: enrolled, policy: a.cfg.Policy, now: now,
		notice: a.told.on(a.seen.Facts.Kernel)}
}

// Meaning is one state word: what it means and what a person does about it.
type Meaning struct {
	Word    string
	Act     bool // a person must do the next step
	Meaning string
	Next    string // the next step, if the situation has none of its own
}

// States lists every state word, the one that wins first.
// docs/reference/states.md is made of it.
var States = []Meaning{
	{"kernel_unknown", true, "The running kernel could not be identified. Nothing is loaded.", "find out why: klatch status"},
	{"halted", true, "Something that only who holds keys, or a disk from a backup, can have done: a log with two histories, recalls that were taken back, a record of root that went back. Nothing more is loaded; what is loaded stays.", "find out what happened, then as root: klatch resume"},
	{"no_anchor", true, "There is no usable trust anchor: the machine believes no publisher.", "install your publisher's anchor: klatch trust install FILE"},
	{"not_enrolled", true, "The machine has no credential for a server.", "enroll it: klatch enroll --server URL"},
	{"staged", false, "A verified livepatch is on disk and waits to be loaded.", "none; it is loaded by itself"},
	{"held", true, "Something is attached to a function that the livepatch replaces; the kernel would refuse it.", "stop the kprobe or tracer that is named; the livepatch is tried again by itself"},
	{"loading", false, "The loader puts the livepatch into the kernel.", "none; wait"},
	{"transitioning", false, "The kernel moves its tasks to the new code, one by one.", "none; wait, or see who is in the way: klatch blockers"},
	{"stalled", true, "A task kept the transition from finishing; it was canceled and will be tried again.", "stop or restart the task that is named, then: klatch retry"},
	{"soaking", false, "All tasks run the new code; trouble now counts against the livepatch.", "none; wait"},
	{"suspect", true, "The kernel complained while the livepatch soaked. It is still loaded.", "tell the publisher; a newer livepatch or a reboot takes it out"},
	{"disabled", true, "The livepatch was taken out by hand until the next reboot.", "reboot when the reason is gone"},
	{"boot_stopped", true, "Loading at boot was stopped by the boot parameter, the flag file or the boot-loop breaker.", "find out why, remove the cause, reboot"},
	{"failed", true, "A livepatch could not be loaded. It is not tried again by itself.", "correct the reason, then: klatch retry"},
	{"key_untrusted", true, "This machine's kernel would refuse every livepatch of the publisher, because it does not know the module key or the key was revoked. Nothing is downloaded.", "make the kernel trust the key: docs/howto/secure-boot.md"},
	{"check_failed", true, "The machine could not look for livepatches, or refused what it was shown. What is loaded stays loaded.", "see the reason; it is tried again by itself"},
	{"kernel_ended", true, "Kernel upgrade required: no livepatches are made for this kernel build any more. What is loaded stays loaded.", "update the kernel and reboot"},
	{"confirmed", false, "Live patched: a livepatch is loaded, and it passed its soak.", "none"},
	{"no_livepatch", false, "There is no livepatch for this kernel build.", "none; or boot a kernel that has one"},
	{"idle_current", false, "There is nothing to load.", "none"},
}

const logHaltNext = "keep a copy of /var/lib/klatch/log.json and tell the publisher: docs/howto/log-halted.md"

// NeedsPerson says whether a person must act: klatch status --check exits 4.
func NeedsPerson(s wire.State) bool {
	i := slices.IndexFunc(States, func(m Meaning) bool { return m.Word == s.State })
	return i < 0 || States[i].Act || s.Advice == string(advice.Required)
}

// stale is how long good checks may be missing before a machine counts as
// blind. Three missed checks, but not less than a quarter of an hour: a server
// may be restarted.
func (p Policy) stale() time.Duration { return max(3*p.CheckInterval, 15*time.Minute) }

// describe gives the one word with its reason, and every raw axis beside it.
func describe(in inputs) wire.State {
	o, j := in.o, in.j
	adv := in.advice()
	s := wire.State{
		Phase: j.Phase, Sequence: o.loaded(), Highest: o.highest(), Fixes: liveFixes(in),
		Advice: string(adv.Level), Reasons: adv.Codes(), Notice: in.shortNotice(), Seen: j.Accepted,
	}
	var word, next, text string
	var reason fault.Code
	say := func(w string, r fault.Code, format string, args ...any) {
		word, reason, text = w, r, fmt.Sprintf(format, args...)
	}
	back, backCode, backText := o.notBack(j)
	bad, isBad := in.blocked()
	switch {
	case o.FactsErr != nil:
		say("kernel_unknown", codeOr(o.FactsErr, "build_unknown"), "%s", o.FactsErr)
		next = fault.HintOf(o.FactsErr)
	case o.Halt != nil:
		say("halted", o.Halt.code(), "%s", o.Halt.Text)
		if o.Halt.step() == StepLog {
			next = logHaltNext
		}
		s.Class, s.Step = string(Stop), string(o.Halt.step())
	case j.Work != nil && underWay[j.Phase] != "":
		word, reason, text = in.underWay(*j.Work)
		if b := j.Work.Blocking; word == "stalled" && len(b) > 0 {
			next = b[0].Class.Next()
		}
	case o.AnchorErr != nil:
		say("no_anchor", codeOr(o.AnchorErr, "no_anchor"), "%s", o.AnchorErr)
		next = fault.HintOf(o.AnchorErr)
	case !in.enrolled:
		say("not_enrolled", "not_enrolled", "this machine has no credential for a server")
	case isBad && bad.Phase == wire.Suspect:
		say("suspect", bad.Code, "livepatch %d: %s", bad.Sequence, bad.Text)
		s.Class, s.Step = string(Quarantine), string(StepSoak)
	case back != "":
		say(back, backCode, "%s", backText)
		next = backNext[backCode]
	case isBad:
		say("failed", bad.Code, "livepatch %d: %s", bad.Sequence, bad.Text)
		s.Class, s.Step = string(Quarantine), string(StepLoader)
	case o.keyRefused() != nil:
		say("key_untrusted", o.KeyTrust.Code, "%s", o.KeyTrust.Text)
	case in.blind():
		say("check_failed", j.Check.Code, "%s; %s", j.Check.Text, age(j.Check.GoodAt, in.now))
		next = j.Check.Hint
		s.Class, s.Step = string(j.Check.Class), string(j.Check.Step)
	case o.LoaderErr != nil && o.Loader == nil:
		say("check_failed", codeOr(o.LoaderErr, "loader_unreachable"), "%s", o.LoaderErr)
		next = fault.HintOf(o.LoaderErr)
	case in.ended():
		word, reason, text, next = in.endedText()
	case s.Sequence != 0 && s.Highest >= s.Sequence:
		say("confirmed", "live_patched", "livepatch %d with %s", s.Sequence, count(len(s.Fixes), "fix", "fixes"))
		if j.Check.Result == resultCurrent && j.Check.Code == "current" && j.Check.Text != "" {
			text += "; newer: " + j.Check.Text
		}
	case s.Sequence != 0:
		say("soaking", "not_confirmed", "livepatch %d is loaded and not confirmed yet", s.Sequence)
	case j.Check.Result == resultCurrent && j.Check.Code == "no_livepatch" && j.Check.Text != "":
		say("no_livepatch", "left_out", "%s", j.Check.Text)
		next = "ask whoever runs the server"
	case j.Check.Result == resultCurrent && j.Check.Code == "no_livepatch":
		say("no_livepatch", "no_livepatch", "no livepatch is published for kernel %s", o.Facts.Kernel)
	case j.Check.Result == "":
		say("idle_current", "not_checked", "no check was made yet")
	case j.Check.Text != "":
		say("idle_current", j.Check.Code, "nothing is loaded: %s", j.Check.Text)
	default:
		say("idle_current", j.Check.Code, "nothing is loaded, and nothing is offered")
	}
	if next == "" {
		next = States[slices.IndexFunc(States, func(m Meaning) bool { return m.Word == word })].Next
	}
	s.State, s.Reason, s.Text, s.NextStep = word, reason, clip(text), clip(next)
	return s
}

// underWay maps the phases with a livepatch on its way to their word.
var underWay = map[wire.Phase]string{
	wire.Staged: "staged", wire.Loading: "loading", wire.Transitioning: "transitioning",
	wire.Stalled: "stalled", wire.Soaking: "soaking",
}

func (in inputs) underWay(w work) (word string, reason fault.Code, text string) {
	word = underWay[in.j.Phase]
	reason = fault.Code(word)
	switch in.j.Phase {
	default: // the other phases have nothing under way
	case wire.Staged:
		if w.Code == codeHeld {
			word = "held"
		}
		text = fmt.Sprintf("livepatch %d is verified and on disk", w.Sequence)
		if w.After.After(in.now) {
			text += "; it is tried again at " + w.After.UTC().Format(time.RFC3339)
		}
		if w.Text != "" {
			text += ": " + strings.ReplaceAll(w.Text, "\n", "; ")
		}
	case wire.Loading:
		text = fmt.Sprintf("livepatch %d is being loaded", w.Sequence)
	case wire.Transitioning:
		text = fmt.Sprintf("livepatch %d: the kernel moves its tasks to the new code since %s", w.Sequence, in.now.Sub(w.Began).Round(time.Second))
		if w.Cancel {
			reason = "canceling"
			text = fmt.Sprintf("livepatch %d did not finish in time and is being taken back", w.Sequence)
		}
	case wire.Stalled:
		text = fmt.Sprintf("livepatch %d did not finish in time (%s); it is tried again at %s", w.Sequence,
			strings.ReplaceAll(w.Text, "\n", "; "), w.After.UTC().Format(time.RFC3339))
	case wire.Soaking:
		left := max(in.policy.soak(w)-in.now.Sub(in.j.Since), 0)
		text = fmt.Sprintf("livepatch %d is loaded; it is confirmed in %s if the kernel does not complain", w.Sequence, left.Round(time.Second))
		if w.Text != "" {
			text = fmt.Sprintf("livepatch %d is loaded and not confirmed: %s", w.Sequence, w.Text)
		}
	}
	if w.Code != "" && in.j.Phase != wire.Transitioning {
		reason = w.Code
	}
	return word, reason, text
}

// blocked is the record that matters now: the suspect that is loaded, or the
// newest failure that nothing loaded has superseded.
func (in inputs) blocked() (b blocked, ok bool) {
	loaded := in.o.loaded()
	for _, c := range in.j.Blocked {
		relevant := c.Phase == wire.Suspect && c.Sequence == loaded || c.Phase == wire.Failed && c.Sequence > loaded
		if c.Kernel == in.o.Facts.Kernel.ID && c.Code != codeTakenOut && relevant {
			b, ok = c, true
		}
	}
	return b, ok
}

// blind says whether failed checks matter already. One refusal of something
// untrusted does; a server that is away does after a while.
func (in inputs) blind() bool {
	c := in.j.Check
	if c.Result != resultFailed {
		return false
	}
	return c.Kind != fault.Unavailable || c.Step == StepClock || c.GoodAt.IsZero() || in.now.Sub(c.GoodAt) > in.policy.stale()
}

func age(good, now time.Time) string {
	if good.IsZero() {
		return "no check has succeeded yet"
	}
	return fmt.Sprintf("the last good check was %s ago", now.Sub(good).Round(time.Minute))
}

// backNext is the next step where a confirmed livepatch is not loaded.
var backNext = map[fault.Code]string{
	"off_parameter": "boot without klatch=off when the reason is gone",
	"off_flag":      "remove /etc/klatch/off when the reason is gone, then reboot",
	"off_breaker":   "see klatch history; when the reason is gone: klatch-loader clear-breaker, then reboot",
}

// liveFixes is what the loaded livepatch fixes: by the loader, which has its
// manifest, or by our own journal.
func liveFixes(in inputs) []livepatch.Fix {
	loaded := in.o.loaded()
	fixes := []livepatch.Fix{}
	if loaded == 0 {
		return fixes
	}
	if st := in.o.Loader; st != nil && st.Loaded != nil && st.Loaded.Sequence == loaded && st.Loaded.Fixes != nil {
		return append(fixes, st.Loaded.Fixes...)
	}
	if w := in.j.Work; w != nil && w.Sequence == loaded {
		return append(fixes, w.Fixes...)
	}
	return fixes
}

func codeOr(err error, c fault.Code) fault.Code {
	if got := fault.CodeOf(err); got != "" {
		return got
	}
	return c
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
