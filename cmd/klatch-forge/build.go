// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/notices"
	"klatch/internal/forge/queue"
	"klatch/internal/kernel"
)

func buildCommand(o *options) *cobra.Command {
	var release, function, series string
	var asJSON bool
	var parallel int
	var limits buildLimits
	c := &cobra.Command{
		Use:   "build --kernel RELEASE | --series SERIES",
		Short: "Build one cumulative livepatch from the queue",
		Long: `Compiles the touched files as they are and as patched, proves that the
unpatched code is byte for byte what the distribution's kernel runs, extracts
the changed functions and links them into one module with replace set. The same
queue gives the same bytes; a changed queue gives the next sequence.

A queue with a hand-written livepatch (klatch-forge queue add --source) is
compiled as it is; that the functions which it replaces are the kernel's own,
with their prototypes, is proved, and what the new ones do is not.

All foreign programs run as a user of their own without network, over a copy
that is thrown away. A build that hangs, or that takes more than --memory,
--disk or --timeout allow, ends as broken.

Exit status: 0 built; 3 refused, with code, place, rule and a hint
(docs/reference/refusals.md); 4 this kernel was built from none of the touched
files; 75 broken: the builder's fault, try again.

--series builds the queue of a series for each of its kernels that is still
supported, a few at once; they share what was compiled before. Its exit status
is the worst of all.

--explain FUNCTION builds nothing and says of one function what changes, in
source and object code, and why the livepatch replaces it or why not.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if function != "" {
				return cli.Cannot(explainFunction(cmd, o, kernel.Release(release), function, asJSON), "explain %s", function)
			}
			if series != "" {
				return buildSeries(cmd, o, series, parallel, &limits, asJSON)
			}
			res, err := runBuild(cmd, o, kernel.Release(release), &limits)
			if err != nil {
				return cli.Cannot(err, "build a livepatch for %s", release)
			}
			if asJSON {
				b, err := json.MarshalIndent(res, "", "  ")
				if err != nil {
					return err
				}
				out(cmd, "%s\n", b)
			} else {
				printBuild(cmd, res)
			}
			if s := res.ExitStatus(); s != 0 {
				return cli.ExitWith(s)
			}
			return nil
		},
	}
	optionalKernelFlag(c, &release)
	c.Flags().StringVar(&series, "series", "", "build for all kernels of this series, such as debian-6.1")
	c.Flags().IntVar(&parallel, "parallel", 2, "with --series: kernels at once")
	c.MarkFlagsOneRequired("kernel", "series")
	c.MarkFlagsMutuallyExclusive("kernel", "series")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result as JSON (docs/reference/build.md)")
	c.Flags().StringVar(&function, "explain", "", "say of this function why it is in the livepatch, or why not; builds nothing")
	c.MarkFlagsMutuallyExclusive("explain", "series")
	limits.flags(c)
	return c
}

func runBuild(cmd *cobra.Command, o *options, r kernel.Release, limits *buildLimits) (build.Result, error) {
	var none build.Result
	d, plan, driver, err := planned(cmd, o, r, limits)
	if err != nil {
		return none, err
	}
	started := time.Now()
	res, err := build.Run(cmd.Context(), driver, plan, d.Path, build.NewClock(o.console(cmd).step))
	if err != nil {
		return res, err
	}
	if err := notices.Keep(d, plan, res); err != nil || res.Result != build.Built {
		return res, err
	}
	return res, attestBuild(cmd, o, d, plan, res, started)
}

// planned composes the plan of the queue as it is, and the driver for it.
func planned(cmd *cobra.Command, o *options, r kernel.Release, limits *buildLimits) (d datadir.Dir, plan compose.Plan, driver build.Builder, err error) {
	if d, err = o.data(); err != nil {
		return d, plan, nil, err
	}
	e, err := catalog.Load(d.Path, r)
	if err != nil {
		return d, plan, nil, err
	}
	if err := e.Allow(time.Now()); err != nil {
		return d, plan, nil, err
	}
	if state, text := supportText(e.Support, time.Now()); state == catalog.Ending {
		o.console(cmd).say("support of %s is %s: say so to those who run it", e.Release, text)
	}
	q := queue.Open(d.Path, e.Series)
	patches, err := q.List()
	if err != nil {
		return d, plan, nil, err
	}
	hand, err := q.Handwritten()
	if err != nil {
		return d, plan, nil, err
	}
	driver, tools, err := newBuilder(cmd, o, e, hand, limits)
	if err != nil {
		return d, plan, nil, err
	}
	done, err := build.Read(d.Path, r)
	if err != nil {
		return d, plan, nil, err
	}
	plan = compose.NewHandwritten(e, hand, patches, tools, 0)
	if hand == nil {
		if plan, err = compose.New(e, patches, tools, 0); err != nil {
			return d, plan, nil, err
		}
	}
	digest, err := plan.Digest()
	if err != nil {
		return d, plan, nil, err
	}
	plan.Sequence = build.Next(done, digest)
	return d, plan, driver, nil
}

func printBuild(cmd *cobra.Command, r build.Result) {
	switch r.Result {
	case build.Built:
		out(cmd, "built     %s sequence %d for %s\n", filepath.Base(r.Module.Path), r.Sequence, r.KernelBuild())
		out(cmd, "module    %s\n          %d bytes, sha256 %s\n", r.Module.Path, r.Module.Bytes, r.Module.SHA256)
		out(cmd, "fixes     %s\n", joinIDs(r.Fixes))
		out(cmd, "match     %d of %d functions identical with the kernel's own code\n", r.Match.Identical, r.Match.Checked)
		for _, p := range r.Match.Replaced {
			out(cmd, "          %s in %s: %d bytes and %d references proved\n", p.Function, p.File, p.Bytes, p.Relocations)
		}
		for _, f := range r.NotBuilt {
			out(cmd, "not built %s: this kernel does not have it\n", f)
		}
		out(cmd, "time      %.1f s\n", r.Seconds["total"])
		if len(r.Warnings) > 0 {
			out(cmd, "\nwarnings  a reviewer must look at these\n")
			printRefusals(cmd, r.Warnings)
		}
	case build.NotAffected:
		out(cmd, "not affected  %s was built from none of the touched files: there is nothing to livepatch\n", r.KernelBuild())
		for _, f := range r.NotBuilt {
			out(cmd, "              %s\n", f)
		}
	case build.Refused:
		out(cmd, "refused   sequence %d for %s\n", r.Sequence, r.KernelBuild())
		printRefusals(cmd, r.Refusals)
	case build.Broken:
		out(cmd, "broken    %s\n", r.Error)
		if r.Hint != "" {
			out(cmd, "hint      %s\n", r.Hint)
		}
		out(cmd, "This is the builder's fault, not the fix's. Try again; if it stays, report it.\n")
	}
}

func printRefusals(cmd *cobra.Command, rs []build.Refusal) {
	for _, f := range rs {
		place := []string{f.File}
		for _, p := range [][2]string{{"function", f.Function}, {"type", f.Type}, {"section", f.Section}} {
			if p[1] != "" {
				place = append(place, p[0]+" "+p[1])
			}
		}
		out(cmd, "\n  %s: %s\n    rule    %s\n    hint    %s\n", f.Code, strings.Join(place, ", "), f.Rule, f.Hint)
		if f.Detail != "" {
			out(cmd, "    detail  %s\n", strings.ReplaceAll(f.Detail, "\n", "\n            "))
		}
	}
}

func joinIDs(ids []cve.ID) string {
	var s []string
	for _, id := range ids {
		s = append(s, string(id))
	}
	return strings.Join(s, ", ")
}
