// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/kernel"
)

// buildSeries builds one queue for many kernels. A kernel that goes wrong does
// not keep the others from being built.
func buildSeries(cmd *cobra.Command, o *options, series string, parallel int, limits *buildLimits, asJSON bool) error {
	kernels, ended, err := kernelsOf(o, series)
	if err != nil {
		return cli.Cannot(err, "build for series %s", series)
	}
	results := make([]build.Result, len(kernels))
	var g errgroup.Group
	g.SetLimit(max(1, parallel))
	for i, e := range kernels {
		g.Go(func() error {
			res, err := runBuild(cmd, o, e.Release, limits)
			if err != nil {
				res = build.Result{Version: 1, Kernel: e.Release, Distro: e.Distro, Arch: e.Arch, BuildID: e.BuildID,
					Result: build.Broken, Error: err.Error(), Hint: fault.HintOf(err)}
			}
			results[i] = res
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if asJSON {
		if err := cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"series": series, "results": results, "ended": ended}); err != nil {
			return err
		}
	} else {
		for _, r := range results {
			out(cmd, "%-32s %s\n", r.Kernel, inOneLine(r))
		}
		for _, r := range ended {
			out(cmd, "%-32s support has ended: nothing is built\n", r)
		}
	}
	if s := worst(results); s != 0 {
		return cli.ExitWith(s)
	}
	return nil
}

// tested is how the test of one kernel of a series ended.
type tested struct {
	Kernel kernel.Release `json:"kernel"`
	Result *proof.Result  `json:"result"` // null where it could not be tested
	Error  string         `json:"error,omitempty"`
	Hint   string         `json:"hint,omitempty"`
}

// testSeries tests the newest livepatch of each kernel of a series. One that
// cannot be tested is no pass, and keeps no other from being tested.
func testSeries(cmd *cobra.Command, o *options, series string, f trialFlags, asJSON bool) error {
	kernels, ended, err := kernelsOf(o, series)
	if err != nil {
		return cli.Cannot(err, "test series %s", series)
	}
	results := make([]tested, 0, len(kernels))
	for _, e := range kernels {
		t := tested{Kernel: e.Release}
		res, err := runTest(cmd, o, e.Release, f)
		if err != nil {
			t.Error, t.Hint = err.Error(), fault.HintOf(err)
		} else {
			t.Result = &res
		}
		results = append(results, t)
	}
	if asJSON {
		if err := cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"series": series, "results": results, "ended": ended}); err != nil {
			return err
		}
	} else {
		for _, t := range results {
			if t.Result == nil {
				out(cmd, "%-32s not tested: %s\n", t.Kernel, t.Error)
			} else {
				out(cmd, "%-32s %s, sequence %d, %d stories\n", t.Kernel, t.Result.Verdict, t.Result.Sequence, len(t.Result.Scenarios))
			}
		}
		for _, r := range ended {
			out(cmd, "%-32s support has ended: nothing is tested\n", r)
		}
	}
	if s := worstTest(results); s != 0 {
		return cli.ExitWith(s)
	}
	return nil
}

// worstTest is the exit status of many tests: 3 where a livepatch failed, 75
// where one was not shown to pass.
func worstTest(results []tested) int {
	status := 0
	for _, t := range results {
		switch {
		case t.Result != nil && t.Result.Verdict == lab.Fail:
			return 3
		case t.Result == nil || t.Result.Verdict != lab.Pass:
			status = 75
		}
	}
	return status
}

// kernelsOf lists the kernels of a series that are still supported, and the
// releases of the others.
func kernelsOf(o *options, series string) (kernels []catalog.Entry, ended []string, err error) {
	d, err := o.data()
	if err != nil {
		return nil, nil, err
	}
	all, err := catalog.List(d.Path)
	if err != nil {
		return nil, nil, err
	}
	ended = []string{}
	for _, e := range all {
		switch {
		case e.Series != series:
		case fault.CodeOf(e.Allow(time.Now())) == "kernel_ended":
			ended = append(ended, string(e.Release))
		default:
			kernels = append(kernels, e)
		}
	}
	if len(kernels)+len(ended) == 0 {
		return nil, nil, fault.New(fault.NotFound, "no_kernel", "no kernel of the catalog is of series %s", series).
			WithHint("look at them: klatch-forge kernel list")
	}
	return kernels, ended, nil
}

func inOneLine(r build.Result) string {
	switch r.Result {
	case build.Built:
		return fmt.Sprintf("built, sequence %d, %d functions, %d bytes, %.1f s", r.Sequence, len(r.Functions), r.Module.Bytes, r.Seconds["total"])
	case build.Refused:
		return fmt.Sprintf("refused: %s %s", r.Refusals[0].Code, cmp.Or(r.Refusals[0].Function, r.Refusals[0].File))
	case build.NotAffected:
		return "not affected"
	default:
		return "broken: " + r.Error
	}
}

// worst is the exit status of many results: not affected is fine where others
// are built.
func worst(results []build.Result) int {
	status, rank := 0, -1
	for _, r := range results {
		if n := slices.Index([]int{4, 0, 3, 75}, r.ExitStatus()); n > rank {
			status, rank = r.ExitStatus(), n
		}
	}
	return status
}
