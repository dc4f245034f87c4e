// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/rolloutdraft"
)

const tierHelp = `tier shows and orders the tiers: groups of machines that get a livepatch one
after the other. A new livepatch lands in the first tier. It goes to each other
one when people promote it (klatch-fleet promote) and its soak there is over.

The list of tiers is signed by people. In profile lab their keys lie on the
server and a change is in force at once; in small and full it becomes a draft,
a file that two of them sign (klatch-fleet draft sign).`

func tierCommand(o *options) *cobra.Command {
	parent := &cobra.Command{Use: "tier", Short: "show and order the tiers", Long: tierHelp, Args: cobra.NoArgs}
	parent.AddCommand(tierList(o), tierAdd(o), tierMove(o), tierSoak(o), tierRemove(o))
	return parent
}

func tierList(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list", Short: "list the tiers and what they run", Args: cobra.NoArgs,
		Long: "list shows the tiers in their order, what each runs, what soaks, and what\nwaits for a promotion.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "list tiers")
			}
			r, err := client.Rollout(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "list tiers")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"operator": r.Operator, "profile": r.Profile, "upstream": r.Upstream, "tiers": r.Tiers})
			}
			if r.Upstream != "" {
				fmt.Fprintf(cmd.OutOrStdout(), "tiers of operator %s, followed from %s; this server changes none\n", cli.Clean(r.Operator), cli.Clean(r.Upstream)) //nolint:errcheck // Flush tells
			}
			w := newTable(cmd.OutOrStdout(), "PLACE", "TIER", "SOAK", "MACHINES", "HOLD")
			for i, t := range r.Tiers {
				hold := "-"
				if t.Hold != "" {
					hold = quoted(t.Hold)
				}
				w.row(i+1, t.Name, fmt.Sprintf("%d h", t.SoakHours), t.Machines, hold)
			}
			w.row()
			w.row("TIER", "IS", "SINCE OR FROM", "LIVEPATCH")
			for _, t := range r.Tiers {
				line := func(is string, at time.Time, target string) {
					w.row(t.Name, is, at.UTC().Format(time.RFC3339), target)
				}
				for _, s := range t.Selected {
					line("selected", s.Since, s.Target)
				}
				for _, s := range t.Soaking {
					line("soaking", s.Opens, s.Target)
				}
				for _, s := range t.Waiting {
					line("not promoted", s.Since, s.Target)
				}
			}
			return w.end()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	return c
}

// change is what all commands share that people must sign for.
type change struct {
	reason, draft string
	asJSON        bool
}

func (ch *change) flags(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&ch.reason, "reason", "", "why; it is signed and recorded")
	c.Flags().StringVar(&ch.draft, "draft", "klatch-draft.json", "file for what people must sign; it must not exist")
	c.Flags().BoolVar(&ch.asJSON, "json", false, "print the outcome for programs")
	return c
}

// do asks the server, and writes the draft if there is one.
func (ch *change) do(cmd *cobra.Command, o *options, what string, ask func(context.Context, *adminapi.Client) (adminapi.RolloutAnswer, error)) error {
	if _, err := os.Lstat(ch.draft); !errors.Is(err, fs.ErrNotExist) {
		return cli.Cannot(fault.New(fault.Conflict, "file_exists", "file %s is there already (%w)", ch.draft, orExists(err)).
			WithHint("complete or remove that draft, or name another file: --draft FILE"), "%s", what)
	}
	client, err := o.client()
	if err != nil {
		return cli.Cannot(err, "%s", what)
	}
	a, err := ask(cmd.Context(), client)
	if err != nil {
		return cli.Cannot(err, "%s", what)
	}
	file := ch.draft
	if a.InForce {
		file = ""
	} else if err := writeDraft(ch.draft, a.Draft); err != nil {
		return cli.Cannot(err, "%s", what)
	}
	if ch.asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"in_force": a.InForce, "draft": file})
	}
	if a.InForce {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), "in force")
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "nothing is changed yet: people must sign %s\nnext: klatch-fleet draft sign %s --key YOURS.key --anchor rollout.json\n", file, file)
	return err
}

func orExists(err error) error {
	if err == nil {
		return fs.ErrExist
	}
	return err
}

// writeDraft writes what the server prepared, if it is a draft at all.
func writeDraft(path string, raw json.RawMessage) error {
	d, err := rolloutdraft.Parse(raw)
	if err != nil {
		return err
	}
	b, err := d.Encode()
	if err != nil {
		return err
	}
	return durable.WriteFile(path, b, 0o600)
}

// me is the name that the record gets beside the token; nobody checks it.
func me() string {
	u, err := user.Current()
	if err != nil {
		return ""
	}
	return u.Username
}

func (ch *change) tier(cmd *cobra.Command, o *options, order adminapi.TierOrder) error {
	order.Reason, order.By = ch.reason, me()
	return ch.do(cmd, o, order.Op+" tier "+order.Name, func(ctx context.Context, c *adminapi.Client) (adminapi.RolloutAnswer, error) {
		return c.OrderTiers(ctx, order)
	})
}

func tierAdd(o *options) *cobra.Command {
	var ch change
	var order adminapi.TierOrder
	c := &cobra.Command{
		Use: "add NAME", Short: "add a tier", Args: cobra.ExactArgs(1),
		Long:    "add puts a tier at a place of the list, by default the end. Whatever is first\ngets new livepatches at once.",
		Example: "  klatch-fleet tier add early --place 2 --soak 24",
		RunE: func(cmd *cobra.Command, args []string) error {
			order.Op, order.Name = adminapi.TierAdd, args[0]
			return ch.tier(cmd, o, order)
		},
	}
	c.Flags().IntVar(&order.Place, "place", 0, "place in the list, 1 is the first; default: the end")
	c.Flags().IntVar(&order.SoakHours, "soak", 0, "hours that a livepatch must have been in the tier before")
	return ch.flags(c)
}

func tierMove(o *options) *cobra.Command {
	var ch change
	var order adminapi.TierOrder
	c := &cobra.Command{
		Use: "move NAME --place N", Short: "put a tier at another place", Args: cobra.ExactArgs(1),
		Long: "move changes the order. Promotions stay: they are to a tier, and not to a place.",
		RunE: func(cmd *cobra.Command, args []string) error {
			order.Op, order.Name = adminapi.TierMove, args[0]
			return ch.tier(cmd, o, order)
		},
	}
	c.Flags().IntVar(&order.Place, "place", 0, "place in the list, 1 is the first; 0: the end")
	return ch.flags(c)
}

func tierSoak(o *options) *cobra.Command {
	var ch change
	return ch.flags(&cobra.Command{
		Use: "soak NAME HOURS", Short: "set how long a tier waits", Args: cobra.ExactArgs(2),
		Long: "soak sets for how many hours a livepatch must have been in the tier before\nuntil this one is opened for it. Machines count themselves.",
		RunE: func(cmd *cobra.Command, args []string) error {
			hours, err := strconv.Atoi(args[1])
			if err != nil {
				return cli.Cannot(fault.New(fault.Invalid, "bad_hours", "%.40q is not a number of hours", args[1]), "change tier %s", args[0])
			}
			return ch.tier(cmd, o, adminapi.TierOrder{Op: adminapi.TierSoak, Name: args[0], SoakHours: hours})
		},
	})
}

func tierRemove(o *options) *cobra.Command {
	var ch change
	var order adminapi.TierOrder
	c := &cobra.Command{
		Use: "remove NAME", Short: "remove a tier", Args: cobra.ExactArgs(1),
		Long: "remove takes a tier out. Machines that are still in it keep what they have and\nget nothing new; so a tier with machines is removed with --force only.",
		RunE: func(cmd *cobra.Command, args []string) error {
			order.Op, order.Name = adminapi.TierRemove, args[0]
			return ch.tier(cmd, o, order)
		},
	}
	c.Flags().BoolVar(&order.Force, "force", false, "although machines are in it")
	return ch.flags(c)
}
