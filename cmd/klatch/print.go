// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/notice"
	"klatch/internal/stall"
)

// printStatus is for people: the answer first, then the facts behind it.
func printStatus(w io.Writer, s agent.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		for i, line := range strings.Split(text, "\n") {
			if i > 0 {
				name = ""
			}
			fmt.Fprintf(t, "%s\t%s\n", name, clean(line)) //nolint:errcheck // Flush tells
		}
	}
	st := s.State
	row("State:", "%s", st.State)
	row("Reason:", "%s: %s", st.Reason, st.Text)
	if st.Class != "" {
		row("Refused at:", "step %s: %s", st.Step, classes[agent.Class(st.Class)])
	}
	row("Next step:", "%s", st.NextStep)
	if s.Facts.Kernel.ID.IsZero() {
		row("Kernel:", "unknown")
	} else {
		row("Kernel:", "%s, %s", s.Facts.Kernel, s.Facts.Kernel.Distro)
	}
	row("Livepatch:", "%s", loaded(st.Sequence, st.Highest))
	if len(st.Fixes) > 0 {
		row("Fixes:", "%s", fixes(st.Fixes))
	}
	row("Support:", "%s", support(s.Notice))
	if s.Notice != nil && len(s.Notice.CVEs) > 0 {
		row("Not fixed:", "%s", notFixed(s.Notice.CVEs))
	}
	for i, b := range s.Blocking {
		row(map[bool]string{true: "Blocked by:"}[i == 0], "%s", blockingLine(b))
	}
	for i, t := range s.Tracers {
		row(map[bool]string{true: "Tracers:"}[i == 0], "%s", t)
	}
	row("Reboot:", "%s", reboot(s))
	row("Lockdown:", "%s; modules must be signed: %s", s.Facts.Lockdown, s.Facts.Enforced)
	if k := s.ModuleKey; k != nil {
		row("Module key:", "%s", moduleKey(*k))
	}
	if s.Identity != nil {
		row("Server:", "%s, as %s in tier %s", s.Identity.Server, s.Identity.MachineID, s.Identity.Tier)
	} else {
		row("Server:", "not enrolled")
	}
	if s.Trust != nil {
		row("Publisher:", "%s, profile %s", s.Trust.Publisher, s.Trust.Profile)
	} else {
		row("Publisher:", "none is trusted")
	}
	if s.Rollout != nil {
		row("Rollout:", "%s, profile %s; this machine is in tier %s", s.Rollout.Operator, s.Rollout.Profile, s.Rollout.Tier)
	} else {
		row("Rollout:", "no operator's anchor; the server chooses, without tiers")
	}
	row("Last check:", "%s", lastCheck(s))
	if s.Halt != nil {
		row("Halted:", "since %s", when(s.Halt.At))
	}
	for i, q := range s.Quarantine {
		row(map[bool]string{true: "Quarantine:"}[i == 0], "livepatch %d since %s, at step %s: %s", q.Sequence, when(q.At), q.Step, q.Code)
	}
	if s.Queued > 0 {
		row("Reports:", "%d wait for the server", s.Queued)
	}
	for i, p := range s.Problems {
		row(map[bool]string{true: "Problems:"}[i == 0], "%s", p)
	}
	return t.Flush()
}

// classes says what a refusal means.
var classes = map[agent.Class]string{
	agent.Stay:       "stay; looked at again by itself",
	agent.Quarantine: "quarantine; the same bytes are not tried again",
	agent.Stop:       "halt; nothing more is loaded until a person has looked",
}

// moduleKey says what the kernel will do with the publisher's livepatches.
func moduleKey(v bootkeys.Verdict) string {
	word := map[bootkeys.Word]string{bootkeys.Trusted: "will be trusted", bootkeys.Refused: "will be refused",
		bootkeys.NotEnforced: "is not asked for", bootkeys.Unknown: "could not find out"}[v.Word]
	line := fmt.Sprintf("%s: %s; Secure Boot is %s", cmp.Or(word, string(v.Word)), v.Text, v.SecureBoot)
	if v.HowTo != "" {
		line += "; see " + v.HowTo
	}
	return line
}

func blockingLine(b agent.Blocking) string {
	kind := "task"
	if b.Kthread {
		kind = "kernel thread"
	}
	return fmt.Sprintf("%s %d (%s) in %s: %s", kind, b.TID, dash(b.Name), dash(b.Function), b.Class)
}

// printBlockers is for people: one line a task, the worst first.
func printBlockers(w io.Writer, list []loaderapi.Blocker, replaced []livepatch.Function) error {
	var tasks []stall.Task
	for _, b := range list {
		tasks = append(tasks, stall.ParseTask(b.PID, b.TID, b.Stat, b.Stack))
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PID\tTID\tNAME\tSTATE\tWHY\tIN") //nolint:errcheck // Flush tells
	for _, b := range stall.All(tasks, replaced) {
		//nolint:errcheck // Flush tells
		fmt.Fprintf(t, "%d\t%d\t%s\t%s\t%s\t%s\n", b.PID, b.TID, dash(b.Comm), dash(b.State), b.Class, dash(b.Function.String()))
	}
	return t.Flush()
}

func loaded(s, highest livepatch.Sequence) string {
	switch {
	case s == 0 && highest == 0:
		return "none"
	case s == 0:
		return fmt.Sprintf("none; the highest ever confirmed here is %d", highest)
	case highest >= s:
		return fmt.Sprintf("%d, confirmed", s)
	default:
		return fmt.Sprintf("%d, not confirmed yet", s)
	}
}

func fixes(fs []livepatch.Fix) string {
	var lines []string
	for _, f := range fs {
		line := string(f.CVE)
		if f.Check != livepatch.Passed {
			line += " (" + string(f.Check) + ")"
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// support is what the publisher says of the kernel build. Silence is not good
// news.
func support(n *agent.Notice) string {
	switch {
	case n == nil:
		return "unknown: the publisher says nothing of this kernel build"
	case n.Support == notice.Ended:
		return n.Text + "\nkernel upgrade required" + instead(n)
	case n.Support == notice.Ending:
		return n.Text + "\nplan the update" + instead(n)
	default:
		return n.Text
	}
}

func instead(n *agent.Notice) string {
	if n.Instead == "" {
		return ""
	}
	return ": run " + string(n.Instead) + " or newer"
}

// notFixed lists the CVEs that no livepatch fixes here.
func notFixed(cves []notice.CVE) string {
	const most = 20
	var lines []string
	for i, c := range cves {
		if i == most && len(cves) > most+1 {
			lines = append(lines, fmt.Sprintf("and %d more: klatch status --json", len(cves)-most))
			break
		}
		todo := "update and reboot"
		if c.Advice == notice.Wait {
			todo = "nothing to do now"
		}
		lines = append(lines, fmt.Sprintf("%s (%s): %s; %s", c.ID, c.Code, oneLine(c.Text), todo))
	}
	return strings.Join(lines, "\n")
}

func reboot(s agent.Status) string {
	lines := []string{string(s.Reboot.Level)}
	for _, r := range s.Reboot.Reasons {
		if r.Code != "livepatch_loaded" && r.Code != "support_ending" {
			lines = append(lines, r.Text)
		}
	}
	if len(lines) > 1 {
		lines[0] += ": " + lines[1]
		lines = append(lines[:1], lines[2:]...)
	}
	return strings.Join(lines, "\n")
}

func lastCheck(s agent.Status) string {
	c := s.Check
	if c.Result == "" {
		return "none yet"
	}
	line := fmt.Sprintf("%s (%s ago): %s", when(c.At), s.At.Sub(c.At).Round(time.Second), c.Result)
	if string(c.Code) != c.Result {
		line += ", " + string(c.Code)
	}
	if c.Text != "" {
		line += "\n" + c.Text
	}
	return line
}

func number(s livepatch.Sequence) string {
	if s == 0 {
		return "-"
	}
	return fmt.Sprint(s)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return clean(s)
}

func oneLine(s string) string { return clean(strings.ReplaceAll(s, "\n", "; ")) }

// clean keeps foreign words from steering the terminal or the table.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}
