// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/machine/advice"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/local"
)

func statusCommand(p *places) *cobra.Command {
	var asJSON, check bool
	var format string
	c := &cobra.Command{
		Use:   "status",
		Short: "show whether the running kernel is live patched",
		Long: `status shows one state with its reason and the next step, then the facts behind
it. The states are listed in docs/reference/states.md. A state of "confirmed"
means: a livepatch is loaded and passed its soak.

A fix marked "unchecked" was built and loads, but nobody has shown that it
works on this kernel build.`,
		Example: "  klatch status\n  klatch status --json | jq -r .state.state\n  klatch status --check >/dev/null || mail -s 'look at this machine' root",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"text", "json", "yaml"}, format) {
				return cli.Cannot(fault.New(fault.Invalid, "usage", "format %.20q is unknown", format).WithHint("use text, json or yaml"), "show the status")
			}
			s, err := p.klatchd().Status(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "show the status")
			}
			if asJSON {
				format = "json"
			}
			switch format {
			case "json":
				err = printJSON(cmd.OutOrStdout(), s)
			case "yaml":
				err = printYAML(cmd.OutOrStdout(), s)
			default:
				err = printStatus(cmd.OutOrStdout(), s)
			}
			if err == nil && check && s.Act {
				return cli.ExitWith(4)
			}
			return err
		},
	}
	c.Flags().StringVar(&format, "format", "text", "text, json or yaml; docs/reference/status.schema.json describes the last two")
	c.Flags().BoolVar(&asJSON, "json", false, "the same as --format json")
	c.Flags().BoolVar(&check, "check", false, "exit with 4 if a person must act")
	return c
}

func checkCommand(p *places) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "look for a newer livepatch now",
		Long: `check makes klatchd ask the server once, at once, and prints the state before
and after. What is found is verified and then loaded by itself; follow that
with klatch status.`,
		Example: "  klatch check",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := p.klatchd().Check(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "check for livepatches")
			}
			if err := printBeforeAfter(cmd.OutOrStdout(), r); err != nil {
				return err
			}
			if c := r.After.Check; c.Result == "failed" {
				return cli.Cannot(fault.New(c.Kind, c.Code, "%s", c.Text).WithHint("%s", c.Hint), "check for livepatches")
			}
			return nil
		},
	}
}

func retryCommand(p *places) *cobra.Command {
	return &cobra.Command{
		Use:   "retry",
		Short: "try again what failed or stalled",
		Long: `retry forgets that a livepatch failed, was suspect or is in quarantine, ends the
wait of one that stalled, and looks for a livepatch at once. Correct the reason
first: klatch status names it. What was taken out by hand stays out until the
reboot. A halt is not ended by this: see klatch resume.`,
		Example: "  klatch retry",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := p.klatchd().Retry(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "try again")
			}
			return printBeforeAfter(cmd.OutOrStdout(), r)
		},
	}
}

func resumeCommand(p *places) *cobra.Command {
	return &cobra.Command{
		Use:   "resume",
		Short: "end a halt, after a person has looked",
		Long: `resume says that a person has found out why this machine is halted, and that what
there is now is right. A machine halts where somebody with the publisher's keys
contradicts what was signed before, or where root's record went back: nothing
more is loaded, and what is loaded stays. klatch status says why and since when.

After a halt of the log, its memory is put aside as evidence
(/var/lib/klatch/log.json.halt-...), and the next checkpoint is believed as the
first one was. A newer signed policy ends a halt by itself.`,
		Example: "  klatch status\n  klatch resume",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := p.klatchd().Resume(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "end the halt")
			}
			return printBeforeAfter(cmd.OutOrStdout(), r)
		},
	}
}

func historyCommand(p *places) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "history",
		Short:   "list what happened on this machine, newest first",
		Long:    "history lists the last 200 steps of this machine's livepatches: what was staged,\nloaded, confirmed, refused, and each boot.",
		Example: "  klatch history\n  klatch history --json | jq '.entries[] | select(.event == \"refused\")'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := p.klatchd().History(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "show the history")
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), h)
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			for _, e := range h.Entries {
				if _, err := fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", when(e.At), e.Event, number(e.Sequence), dash(string(e.Code)), oneLine(e.Text)); err != nil {
					return err
				}
			}
			return t.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, version 1")
	return c
}

func adviceCommand(p *places) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "advice",
		Short: "say whether this machine should be rebooted, and why",
		Long: `advice prints none, advised, required or unknown, with its reasons.

Exit statuses: 0 none, 10 advised, 11 required, 12 unknown (also if klatchd
cannot be asked).`,
		Example: "  klatch advice\n  klatch advice >/dev/null; [ $? -eq 11 ] && shutdown -r 02:00",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := p.klatchd().Status(cmd.Context())
			if err != nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "klatch: cannot advise: %s\nhint: %s\n", err, fault.HintOf(err)) //nolint:errcheck // nowhere left to tell
				return cli.ExitWith(advice.Unknown.ExitStatus())
			}
			if asJSON {
				err = cli.WriteJSON(cmd.OutOrStdout(), 1, s.Reboot)
			} else {
				err = printAdvice(cmd.OutOrStdout(), s.Reboot)
			}
			if status := s.Reboot.Level.ExitStatus(); err == nil && status != 0 {
				return cli.ExitWith(status)
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, version 1")
	return c
}

func printAdvice(w io.Writer, a advice.Advice) error {
	if _, err := fmt.Fprintf(w, "reboot: %s\n", a.Level); err != nil {
		return err
	}
	for _, r := range a.Reasons {
		if _, err := fmt.Fprintf(w, "  %s: %s\n", r.Code, r.Text); err != nil {
			return err
		}
	}
	return nil
}

func printBeforeAfter(w io.Writer, r local.Checked) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, l := range []struct {
		name string
		s    agent.Status
	}{{"before:", r.Before}, {"after:", r.After}} {
		if _, err := fmt.Fprintf(t, "%s\t%s\t%s\n", l.name, l.s.State.State, oneLine(l.s.State.Text)); err != nil {
			return err
		}
	}
	return t.Flush()
}

func printJSON(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", b)
	return err
}

// printYAML prints the same members in the same order as JSON: JSON is YAML,
// so it is read as such and written in block style.
func printYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return err
	}
	blockStyle(&n)
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	if err := e.Encode(&n); err != nil {
		return err
	}
	return e.Close()
}

func blockStyle(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	for _, c := range n.Content {
		blockStyle(c)
	}
}

func when(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }
