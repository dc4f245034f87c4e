// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/build/lint"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
	"klatch/internal/kernel"
)

func queueLint(o *options) *cobra.Command {
	var release, series string
	var asJSON bool
	c := &cobra.Command{
		Use:   "lint --kernel RELEASE",
		Short: "Say in seconds, without compiling, what a build will refuse",
		Long: `Looks at the queue as a build would, without compiling. "sure" findings will be
refused: assembly, boot images, files that are no code, code of boot time, code
that cannot be traced, a header that reaches too many files, a patch that does
not apply, a changed prototype of an exported function. "probable" ones will be
unless the compiler says otherwise: members of a type, initialized data, tables
of functions. "look" is for a reviewer and stops nothing.

Lint cannot see what only a build knows: it is no promise that the queue builds.

Exit status: 0 nothing sure, 3 the build will refuse.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rep, err := runLint(cmd, o, kernel.Release(release), &series)
			if err != nil {
				return cli.Cannot(err, "look at the queue for %s", release)
			}
			if asJSON {
				err = cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"kernel": release, "series": series, "patches": rep.Patches,
					"objects": rep.Objects, "not_built": rep.NotBuilt, "findings": rep.Findings})
			} else {
				printLint(cmd, rep)
			}
			if err == nil && rep.Refused() {
				err = cli.ExitWith(3)
			}
			return err
		},
	}
	kernelFlag(c, &release)
	c.Flags().StringVar(&series, "series", "", "queue; default: that of the kernel")
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON (docs/reference/build.md)")
	return c
}

func runLint(cmd *cobra.Command, o *options, r kernel.Release, series *string) (lint.Report, error) {
	var none lint.Report
	d, err := o.data()
	if err != nil {
		return none, err
	}
	e, err := catalog.Load(d.Path, r)
	if err != nil {
		return none, err
	}
	if *series == "" {
		*series = e.Series
	}
	patches, err := queue.Open(d.Path, *series).List()
	if err != nil {
		return none, err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return none, err
	}
	return lint.Run(cmd.Context(), cache, e, patches, objbuild.DefaultFanout)
}

func printLint(cmd *cobra.Command, r lint.Report) {
	out(cmd, "%d source patches, %d object files to compile\n", r.Patches, r.Objects)
	for _, f := range r.NotBuilt {
		out(cmd, "not built %s: this kernel does not have it\n", f)
	}
	for _, c := range []lint.Certainty{lint.Sure, lint.Probable, lint.Look} {
		for _, f := range r.Findings {
			if f.Certainty != c {
				continue
			}
			place := []string{f.File}
			for _, p := range [][2]string{{"function", f.Function}, {"type", f.Type}} {
				if p[1] != "" {
					place = append(place, p[0]+" "+p[1])
				}
			}
			out(cmd, "\n  %s %s: %s\n", f.Certainty, f.Code, strings.Join(place, ", "))
			for _, p := range [][2]string{{"patch", f.Patch}, {"rule", f.Rule}, {"hint", f.Hint}, {"detail", f.Detail}} {
				if p[1] != "" {
					out(cmd, "    %-7s %s\n", p[0], strings.ReplaceAll(p[1], "\n", "\n            "))
				}
			}
		}
	}
	if len(r.Findings) == 0 {
		out(cmd, "nothing found; only a build can say that it can be livepatched\n")
	}
}
