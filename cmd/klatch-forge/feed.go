// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/feed"
)

func feedCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "feed", Short: "What others publish about vulnerabilities"}
	c.AddCommand(feedSync(o), feedList(o))
	return c
}

func feedSync(o *options) *cobra.Command {
	var from, date string
	var asJSON bool
	c := &cobra.Command{
		Use:   "sync --from PATH",
		Short: "Copy a feed into the data folder, with digest and date",
		Long: `Reads a feed from a file or folder and keeps it in the data folder. Nothing is
fetched from a network. What a feed is, its name says:

  a folder               CVE-*.json of the kernel CNA, .dyad and .cvss beside them
  *.jsonl, *.jsonl.gz    records of the kernel CNA, one a line
  VENDOR.csv             lines "CVE,priority" of a vendor
  *.toml                 the same as a table, with the vendor's name
  *.json                 CISA's list of known exploited vulnerabilities

Bad records are kept aside and listed in feeds/store/NAME.problems.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "import feed %s", from)
			}
			x, s, err := feed.Sync(d.Path, from, date)
			if err != nil {
				return cli.Cannot(err, "import feed %s", from)
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"name": x.Name, "date": x.Date, "sha256": x.SHA256,
					"records": x.Records, "problems": x.Problems})
			}
			out(cmd, "feed      %s of %s\nsha-256   %s\nrecords   %d, kept aside or in part: %d\n", x.Name, x.Date, x.SHA256, x.Records, x.Problems)
			const few = 5
			listed, _ := s.Problems()
			for _, p := range listed[:min(few, len(listed))] {
				out(cmd, "  %s\n", p)
			}
			if x.Problems > few {
				out(cmd, "  all: feeds/store/%s.problems\n", x.Name)
			}
			return nil
		},
	}
	c.Flags().StringVar(&from, "from", "", "file or folder (needed)")
	c.Flags().StringVar(&date, "date", "", "day that the feed speaks of, such as 2026-08-21 (default: when the file was written)")
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	_ = c.MarkFlagRequired("from")
	return c
}

func feedList(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list", Short: "List the feeds of the data folder", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "list feeds")
			}
			all, err := feed.Snapshots(d.Path)
			if err != nil {
				return cli.Cannot(err, "list feeds")
			}
			if asJSON {
				rows := []map[string]any{}
				for _, x := range all {
					rows = append(rows, map[string]any{"name": x.Name, "date": x.Date, "sha256": x.SHA256, "records": x.Records, "problems": x.Problems})
				}
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"feeds": rows})
			}
			for _, x := range all {
				out(cmd, "%-28s %s %8d records %6d problems  %.12s\n", x.Name, x.Date, x.Records, x.Problems, x.SHA256)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return c
}
