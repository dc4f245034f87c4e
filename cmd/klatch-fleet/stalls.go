// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"slices"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/kernel"
	"klatch/internal/server/adminapi"
	"klatch/internal/stall"
)

// stalled is what held livepatches up in one function of one kernel release.
type stalled struct {
	Kernel   kernel.Release `json:"kernel"`
	Class    stall.Class    `json:"class"`
	Object   string         `json:"object"`
	Function string         `json:"function"`
	Stalls   int            `json:"stalls"`
	Machines int            `json:"machines"`
}

// countStalls adds the reports up, most stalls first.
func countStalls(reports []adminapi.Report) []stalled {
	total := []stalled{}
	machines := map[stalled]map[string]bool{}
	for _, r := range reports {
		for _, c := range r.Report.Stall {
			key := stalled{Kernel: r.Report.Facts.Kernel.Release, Class: c.Class, Object: c.Object, Function: c.Function}
			i := slices.IndexFunc(total, func(s stalled) bool {
				s.Stalls, s.Machines = 0, 0
				return s == key
			})
			if i < 0 {
				i, total, machines[key] = len(total), append(total, key), map[string]bool{}
			}
			machines[key][r.MachineID] = true
			total[i].Stalls++
			total[i].Machines = len(machines[key])
		}
	}
	slices.SortStableFunc(total, func(x, y stalled) int { return cmp.Compare(y.Stalls, x.Stalls) })
	return total
}

func stallsCommand(o *options) *cobra.Command {
	var limit int
	var asJSON bool
	c := &cobra.Command{
		Use: "stalls", Short: "show which functions held livepatches up", Args: cobra.NoArgs,
		Long: `stalls adds up what machines said of transitions that did not finish: by kernel,
class and function, how often and on how many machines. It looks at the newest
reports. A publisher who knows these functions can leave them alone.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "show stalls")
			}
			l, err := client.Reports(cmd.Context(), "", limit)
			if err != nil {
				return cli.Cannot(err, "show stalls")
			}
			total := countStalls(l.Reports)
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"reports": len(l.Reports), "stalls": total})
			}
			w := newTable(cmd.OutOrStdout(), "STALLS", "MACHINES", "CLASS", "OBJECT", "FUNCTION", "KERNEL")
			for _, s := range total {
				w.row(s.Stalls, s.Machines, quoted(s.Class), quoted(s.Object), quoted(s.Function), quoted(s.Kernel))
			}
			return w.end()
		},
	}
	c.Flags().IntVar(&limit, "limit", 1000, "of the newest reports, at most 1000")
	c.Flags().BoolVar(&asJSON, "json", false, "print the list for programs")
	return c
}
