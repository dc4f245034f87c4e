// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/notices"
	"klatch/internal/forge/sign"
	"klatch/internal/kernel"
	"klatch/internal/notice"
)

func kernelNotice(o *options) *cobra.Command {
	var release string
	var asJSON bool
	c := &cobra.Command{
		Use:   "notice --kernel RELEASE",
		Short: "Show what the next publish tells machines of a kernel",
		Long: `Joins support of the catalog, refusals of the ledgers and reviewed decisions into
what machines with exactly this kernel build are told: until when livepatches are
made, whether it was declared dead, and which CVEs no livepatch fixes there. The
policy "everything" of import-delta is a stress test and tells nothing; what a
build of the queue refused is told once a person decided reboot.

Decisions of reboot or defer of which nobody knows whether the flaw is in this
kernel build are listed as untold: run import-delta --dry-run, or add fixed_in.
A kernel of which nothing is known has no notice.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, untold, err := noticeOn(o, kernel.Release(release))
			if err != nil {
				return cli.Cannot(err, "make the notice on %s", release)
			}
			if asJSON {
				if untold == nil {
					untold = []notices.Untold{}
				}
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"published": !n.Empty(), "target": notice.TargetPath(n.Kernel), "notice": n, "untold": untold})
			}
			printNotice(cmd, n, untold)
			return nil
		},
	}
	kernelFlag(c, &release)
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return c
}

func noticeOn(o *options, r kernel.Release) (notice.Notice, []notices.Untold, error) {
	var none notice.Notice
	d, err := o.data()
	if err != nil {
		return none, nil, err
	}
	e, err := catalog.Load(d.Path, r)
	if err != nil {
		return none, nil, err
	}
	k, err := notices.Read(d, time.Now())
	if err != nil {
		return none, nil, err
	}
	all, err := build.Read(d.Path, r)
	if err != nil {
		return none, nil, err
	}
	signed, err := sign.Signed(d, all)
	if err != nil {
		return none, nil, err
	}
	n, untold := k.On(e, notices.Fixed(signed, e.BuildID))
	_, err = n.Encode() // what publish would refuse is said here
	return n, untold, err
}

func printNotice(cmd *cobra.Command, n notice.Notice, untold []notices.Untold) {
	out(cmd, "kernel   %s\n", n.Kernel)
	if n.Empty() {
		out(cmd, "nothing is known: there is no notice\n")
	} else {
		out(cmd, "target   %s\nsupport  %s\n", notice.TargetPath(n.Kernel), n.Support.Text(time.Now()))
	}
	for _, c := range n.CVEs {
		out(cmd, "%s  %s, %s: %s\n", c.ID, c.Code, c.Advice, cli.Clean(c.Text))
	}
	for _, u := range untold {
		out(cmd, "%s  untold: %s says %s, and nothing says whether this kernel build has the flaw\n", u.CVE, u.File, u.Treatment)
	}
}
