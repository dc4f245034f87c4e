// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/server/adminapi"
)

const promoteHelp = `promote opens a tier for livepatches that the tier before runs: those that are
named, by their path or its end, or all of them. Machines of the tier take one
when its soak is over, counted from when the tier before got it.

--urgent waives the soak, and may name what the tier before does not run yet.

A promotion is signed by people. In profile lab their keys lie on the server and
it is in force at once; in small and full it becomes a draft, a file that two
approvers sign (klatch-fleet draft sign).`

func promoteCommand(o *options) *cobra.Command {
	var ch change
	var p adminapi.Promotion
	c := &cobra.Command{
		Use: "promote TIER [LIVEPATCH...] --reason TEXT", Short: "open a tier for livepatches", Long: promoteHelp, Args: cobra.MinimumNArgs(1),
		Example: "  klatch-fleet promote stable --all --reason 'canaries are well for two days'\n  klatch-fleet promote stable 6.1.0-50-cloud-amd64/klatch_7.lpb --urgent --reason CVE-2026-0001",
		RunE: func(cmd *cobra.Command, args []string) error {
			p.Tier, p.Targets, p.Reason, p.By = args[0], args[1:], ch.reason, me()
			return ch.do(cmd, o, "promote to "+p.Tier, func(ctx context.Context, c *adminapi.Client) (adminapi.RolloutAnswer, error) {
				return c.Promote(ctx, p)
			})
		},
	}
	c.Flags().BoolVar(&p.All, "all", false, "all that the tier before runs")
	c.Flags().BoolVar(&p.Urgent, "urgent", false, "do not wait for the soak")
	ch.flags(c)
	if err := c.MarkFlagRequired("reason"); err != nil {
		panic(err) // the flag is some lines above
	}
	return c
}

func holdCommand(o *options) *cobra.Command {
	var reason string
	var asJSON bool
	c := &cobra.Command{
		Use: "hold TIER --reason TEXT", Short: "stop a tier where it is", Args: cobra.ExactArgs(1),
		Long: "hold stops a tier: its machines keep what they have and take nothing new until\nklatch-fleet release. The server signs that; it is in force at once.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return hold(cmd, o, adminapi.Hold{Tier: args[0], Reason: reason, By: me()}, "hold tier "+args[0], asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the outcome for programs")
	c.Flags().StringVar(&reason, "reason", "", "why; machines show it")
	if err := c.MarkFlagRequired("reason"); err != nil {
		panic(err) // the flag is two lines above
	}
	return c
}

func releaseCommand(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "release TIER", Short: "let a tier go on that was on hold", Args: cobra.ExactArgs(1),
		Long: "release ends a hold.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return hold(cmd, o, adminapi.Hold{Tier: args[0], By: me()}, "release tier "+args[0], asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the outcome for programs")
	return c
}

func hold(cmd *cobra.Command, o *options, h adminapi.Hold, what string, asJSON bool) error {
	client, err := o.client()
	if err == nil {
		_, err = client.Hold(cmd.Context(), h)
	}
	if err != nil {
		return cli.Cannot(err, "%s", what)
	}
	if asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"in_force": true})
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), "in force")
	return err
}

func auditCommand(o *options) *cobra.Command {
	var limit int
	var asJSON bool
	c := &cobra.Command{
		Use: "audit", Short: "show who changed what", Args: cobra.NoArgs,
		Long: "audit shows the server's record of changes, newest first; --json has what was\nbefore and after each change too. Lines that do not follow from the one before,\nbecause somebody changed the file, are counted.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "show the record")
			}
			a, err := client.Audit(cmd.Context(), limit)
			if err != nil {
				return cli.Cannot(err, "show the record")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"broken": a.Broken, "entries": a.Entries})
			}
			w := newTable(cmd.OutOrStdout(), "AT", "WHO", "WHAT", "TIER", "REASON")
			for _, e := range a.Entries {
				what := e.What
				if e.Failed != "" {
					what += " (did not happen)"
				}
				w.row(e.At.UTC().Format(time.RFC3339), quoted(e.Who), what, cmp.Or(e.Tier, "-"), quoted(e.Reason))
			}
			if a.Broken > 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "%d lines do not follow from the one before: somebody changed the record\n", a.Broken) //nolint:errcheck // the list matters
			}
			return w.end()
		},
	}
	c.Flags().IntVar(&limit, "limit", 50, "how many, at most 1000")
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	return c
}
