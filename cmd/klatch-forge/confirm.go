// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
)

func confirmCommand(o *options) *cobra.Command {
	var from, as string
	var limits buildLimits
	c := &cobra.Command{
		Use:   "confirm --from DIR",
		Short: "As the second builder, make a livepatch again and sign that the bytes are the same",
		Long: `Builds from the plan that lies beside a build of somebody else, in this data
folder, with this machine's own copy of the kernel and its own tools, and
compares. If kernel, tools and bytes are the same, signs a provenance of its own
with the builder's key in this data folder; else signs nothing and says what
differs.

A second builder is worth something on another machine, under another person's
hand. It needs the kernel in its catalog (kernel add) and the folder of the
build, with build.json, plan.json and nothing that it has to believe. Exit
status 0 confirmed, 3 refused, 75 broken.`,
		Example: `  klatch-forge --dir b confirm --from a/out/6.1.0-50-cloud-amd64/1
  klatch-forge --dir a evidence add --kernel 6.1.0-50-cloud-amd64 b/out/6.1.0-50-cloud-amd64/1/evidence/builder-b.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, k, err := confirm(cmd, o, from, as, &limits)
			if err != nil {
				return cli.Cannot(err, "confirm %s (%s)", from, fault.CodeOf(err))
			}
			out(cmd, "confirmed by %s: the same bytes\nstatement %s\nnext      the publisher: klatch-forge evidence add\n", k.Name, file)
			return nil
		},
	}
	c.Flags().StringVar(&from, "from", "", "folder of the first builder's build, such as out/RELEASE/1 (needed)")
	c.Flags().StringVar(&as, "as", "", "name of the builder's key, where there are several")
	_ = c.MarkFlagRequired("from")
	limits.flags(c)
	return c
}

func confirm(cmd *cobra.Command, o *options, from, as string, limits *buildLimits) (string, evidence.PrivateKey, error) {
	var none evidence.PrivateKey
	first, plan, err := build.Load(from)
	if err != nil {
		return "", none, err
	}
	d, err := o.data()
	if err != nil {
		return "", none, err
	}
	k, err := attest.Key(d, evidence.Builder, as)
	if err != nil {
		return "", none, err
	}
	driver, err := ownInputs(cmd, o, d, plan, limits)
	if err != nil {
		return "", none, err
	}
	started := time.Now()
	res, err := build.Run(cmd.Context(), driver, plan, d.Path, build.NewClock(o.console(cmd).step))
	if fault.CodeOf(err) == "not_reproducible" { // this folder has other bytes from before
		return "", none, fault.New(fault.Denied, "builders_differ", "%w", err)
	}
	if err != nil {
		return "", none, err
	}
	if res.Result == build.Broken {
		return "", none, fault.New(fault.Unavailable, "broken", "the second build is broken: %s", res.Error).WithHint("%s", res.Hint)
	}
	if err := attest.Confirmed(first, res); err != nil {
		return "", none, err
	}
	e, err := attest.Provenance(k, res, plan, version, started, time.Now())
	if err != nil {
		return "", none, err
	}
	file, err := attest.Put(build.Dir(d.Path, res.Kernel, res.Sequence), evidence.Builder, k.Name, e)
	return file, k, err
}

// ownInputs makes the driver from what this machine got by itself, and refuses
// a plan that says otherwise: a builder that takes the first one's word for
// kernel or tools confirms nothing.
func ownInputs(cmd *cobra.Command, o *options, d datadir.Dir, plan compose.Plan, limits *buildLimits) (build.Builder, error) {
	own, err := catalog.Load(d.Path, plan.Kernel.Release)
	if err != nil {
		return nil, err
	}
	same, err := sameEntry(own, plan.Kernel)
	if err != nil {
		return nil, err
	}
	if !same {
		return nil, fault.New(fault.Denied, "inputs_differ", "this machine's kernel %s (build %s) is not the one of the plan (build %s), or came from other packages",
			own.Release, own.BuildID.Short(), plan.Kernel.BuildID.Short()).WithHint("compare the catalog files of both machines")
	}
	driver, tools, err := newBuilder(cmd, o, own, plan.Handwritten, limits)
	if err != nil {
		return nil, err
	}
	a, err := json.Marshal(tools)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(plan.Tools)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(a, b) {
		return nil, fault.New(fault.Denied, "inputs_differ", "this machine's tools are %s, the plan's %s", a, b).WithHint("use the same version of klatch-forge and of the distribution's tools on both")
	}
	return driver, nil
}

func sameEntry(a, b catalog.Entry) (bool, error) {
	x, err := json.Marshal(a)
	if err != nil {
		return false, err
	}
	y, err := json.Marshal(b)
	return bytes.Equal(x, y), err
}
