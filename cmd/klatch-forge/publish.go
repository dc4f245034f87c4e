// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/tufrepo"
)

func signCommand(o *options) *cobra.Command {
	var release string
	c := &cobra.Command{
		Use:   "sign --kernel RELEASE",
		Short: "Sign the newest livepatch, if its evidence suffices",
		Long: `The signing gate. Signs the module as the kernel's sign-file does, and a manifest
that says which bytes are for which kernel build at which sequence; and writes
the evidence file that is published beside them.

Refuses, with a code and a next step, unless as many builders as evidence.toml
asks for made exactly these bytes, all required scenarios passed on exactly this
kernel build, somebody else than the author approved exactly these source
patches, and an analyst says which CVEs are fixed; none of it older than the
policy allows (docs/reference/evidence.md).

Profile lab has one key for all of that, and reviews its own work: this command
says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "sign")
			}
			newest, _, err := newestBuild(d, kernel.Release(release))
			if err != nil {
				return cli.Cannot(err, "sign")
			}
			res, err := sign.Sign(d, newest, time.Now())
			if err != nil {
				return cli.Cannot(err, "sign sequence %d of %s (%s)", newest.Sequence, release, fault.CodeOf(err))
			}
			m := res.Manifest
			out(cmd, "signed    sequence %d for %s\nbundle    %s\n", m.Sequence, m.Kernel, sign.BundleFile(d, newest))
			printEvidence(cmd, res.Evidence)
			for _, f := range m.Fixes {
				if f.Check == livepatch.Unchecked {
					out(cmd, "UNCHECKED %s: nobody showed that this fix works; machines will see that\n", f.CVE)
				}
			}
			return nil
		},
	}
	kernelFlag(c, &release)
	return c
}

func publishCommand(o *options) *cobra.Command {
	var refresh bool
	c := &cobra.Command{
		Use:   "publish",
		Short: "Put all signed livepatches into the repository",
		Long: `Writes livepatches, their evidence and signed metadata into the data folder's repository/, which
any web server or klatch-server can hand out. Metadata expires: the timestamp
after two days. Run "publish --refresh" daily, or machines will report that
they hear nothing new.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			res, err := runPublish(cmd, o, refresh)
			if res.Draft != nil {
				return cli.Cannot(keepDraft(cmd, o, res.Draft), "publish")
			}
			if err != nil {
				return cli.Cannot(err, "publish")
			}
			state := "published"
			if !res.Changed {
				state = "unchanged"
			}
			out(cmd, "%s  targets %d, snapshot %d, timestamp %d, good until %s\n", state, res.Targets, res.Snapshot, res.Timestamp,
				res.Expires.UTC().Format(time.RFC3339))
			return nil
		},
	}
	c.Flags().BoolVar(&refresh, "refresh", false, "only sign again what is about to expire")
	return c
}

// keepDraft writes what this host could not sign alone for the others.
func keepDraft(cmd *cobra.Command, o *options, draft *tufrepo.Draft) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	if err := printWords(cmd, draft); err != nil {
		return err
	}
	return finish(cmd, d, draft, tufrepo.Keys{}, false, time.Now())
}

func runPublish(cmd *cobra.Command, o *options, refresh bool) (tufrepo.Result, error) {
	var none tufrepo.Result
	d, err := o.data()
	if err != nil {
		return none, err
	}
	if refresh {
		return publish.Refresh(cmd.Context(), d, time.Now())
	}
	kernels, err := catalog.List(d.Path)
	if err != nil {
		return none, err
	}
	var signed []build.Result
	for _, e := range kernels {
		all, err := build.Read(d.Path, e.Release)
		if err != nil {
			return none, err
		}
		s, err := sign.Signed(d, all)
		if err != nil {
			return none, err
		}
		signed = append(signed, s...)
	}
	return publish.Publish(cmd.Context(), d, signed, time.Now())
}
