// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/kernel"
)

func explainFunction(cmd *cobra.Command, o *options, r kernel.Release, function string, asJSON bool) error {
	_, plan, builder, err := planned(cmd, o, r, &buildLimits{})
	if err != nil {
		return err
	}
	driver, ok := builder.(*objbuild.Driver)
	if !ok {
		return invalid("the queue's livepatch is not made by the object builder")("only what is built from source patches can be explained")
	}
	e, err := driver.Explain(cmd.Context(), plan, function, build.NewClock(o.console(cmd).step))
	if err != nil {
		return err
	}
	if asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"kernel": r, "explanation": e})
	}
	printExplanation(cmd, e)
	return nil
}

func printExplanation(cmd *cobra.Command, e objbuild.Explanation) {
	state := "is in the livepatch"
	switch {
	case e.Result == build.Refused:
		state = "belongs to a livepatch that is refused"
	case !e.InLivepatch:
		state = "is not replaced by the livepatch"
	}
	out(cmd, "%s %s\n", e.Function, state)
	for _, w := range e.Why {
		out(cmd, "  because  %s\n", w)
	}
	for _, h := range e.Hunks {
		out(cmd, "\nsource    %s, in %s, by source patch %s\n", h.File, h.Function, h.Patch)
		out(cmd, "    %s\n", strings.ReplaceAll(h.Text, "\n", "\n    "))
	}
	for _, c := range e.Code {
		out(cmd, "\ncode      %s of %s in %s: %d bytes, before %d\n", c.Symbol, c.File, c.Object, c.New, c.Old)
		for _, l := range []struct {
			what  string
			names []string
		}{{"inlines", c.Inlines}, {"gained", c.Gained}, {"lost", c.Lost}, {"callers", c.Callers}} {
			if len(l.names) > 0 {
				out(cmd, "    %-8s%s\n", l.what, strings.Join(l.names, ", "))
			}
		}
		if len(c.Assembly) > 0 {
			out(cmd, "    %s\n", strings.Join(c.Assembly, "\n    "))
		}
	}
	for _, p := range e.Proof {
		out(cmd, "\nmatch     %s in %s: %d bytes, %d references, %d strings are those of the kernel's own code\n",
			p.Function, p.Object, p.Bytes, p.Relocations, p.Strings)
	}
	if len(e.Refusals) > 0 {
		out(cmd, "\nrefused\n")
		printRefusals(cmd, e.Refusals)
	}
	if len(e.Warnings) > 0 {
		out(cmd, "\nwarnings  a reviewer must look at these\n")
		printRefusals(cmd, e.Warnings)
	}
}
