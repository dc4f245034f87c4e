// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/changelog"
	"klatch/internal/kernel"
)

func kernelSupport(o *options) *cobra.Command {
	var release, until string
	c := &cobra.Command{
		Use:   "support --kernel RELEASE --until DATE",
		Short: "Say until when livepatches are made for a kernel",
		Long: `Writes the last day of support into the catalog entry, which is reviewed text.
kernel list warns from 60 days before; after it, build refuses. The date is no
input of a build: the same queue still gives the same livepatch. It also takes
back what "kernel end" said.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := changeSupport(o, func(e catalog.Entry) bool { return e.Release == kernel.Release(release) },
				release, catalog.Support{Until: until}, func(e catalog.Entry) { out(cmd, "%s is supported until %s\n", e.Release, until) })
			return cli.Cannot(err, "set the support of %s", release)
		},
	}
	kernelFlag(c, &release)
	c.Flags().StringVar(&until, "until", "", "last day, such as 2027-06-30 (needed)")
	_ = c.MarkFlagRequired("until")
	return c
}

func kernelEnd(o *options) *cobra.Command {
	var release, reason, instead string
	var older bool
	c := &cobra.Command{
		Use:   "end --kernel RELEASE --reason TEXT",
		Short: "Declare a kernel dead: nothing is built for it any more",
		Long: `Marks the kernel in the catalog as ended, today. With --older, every older kernel
of its series too; newer ones stay as they are. What was published stays
published: machines keep what works. The next publish tells those that run it to
update and reboot (klatch-forge kernel notice shows what they are told).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := endKernels(cmd, o, kernel.Release(release), older,
				catalog.Support{Ended: time.Now().UTC().Format(time.DateOnly), Reason: reason, Instead: kernel.Release(instead)})
			return cli.Cannot(err, "end kernel %s", release)
		},
	}
	kernelFlag(c, &release)
	c.Flags().StringVar(&reason, "reason", "", "why, for those who run it (needed)")
	c.Flags().StringVar(&instead, "instead", "", "release that its machines should run")
	c.Flags().BoolVar(&older, "older", false, "all older kernels of the same series too")
	_ = c.MarkFlagRequired("reason")
	return c
}

func endKernels(cmd *cobra.Command, o *options, r kernel.Release, older bool, s catalog.Support) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	last, err := catalog.Load(d.Path, r)
	if err != nil {
		return err
	}
	if older {
		s.Through = r
	}
	var bad error
	chosen := func(e catalog.Entry) bool {
		if e.Release == r {
			return true
		}
		if !older || e.Series != last.Series {
			return false
		}
		n, err := changelog.Compare(e.Version, last.Version)
		if err != nil {
			bad = fmt.Errorf("compare %s with %s: %w", e.Release, r, err)
		}
		return err == nil && n < 0
	}
	if err := changeSupport(o, chosen, string(r), s, func(e catalog.Entry) { out(cmd, "%s has ended\n", e.Release) }); err != nil {
		return err
	}
	return bad
}

// changeSupport writes what is said into all entries that are chosen.
func changeSupport(o *options, chosen func(catalog.Entry) bool, name string, s catalog.Support, tell func(catalog.Entry)) error {
	if _, _, err := s.At(time.Now()); err != nil {
		return err
	}
	d, err := o.data()
	if err != nil {
		return err
	}
	all, err := catalog.List(d.Path)
	if err != nil {
		return err
	}
	found := false
	for _, e := range all {
		if !chosen(e) {
			continue
		}
		found = true
		e.Support = s
		if err := catalog.Save(d.Path, e); err != nil {
			return err
		}
		tell(e)
	}
	if !found {
		_, err = catalog.Load(d.Path, kernel.Release(name)) // says what is missing
	}
	return err
}

// supportText is the column of kernel list.
func supportText(s catalog.Support, now time.Time) (catalog.State, string) {
	state, days, err := s.At(now)
	switch {
	case err != nil:
		return catalog.Unknown, "unknown: " + err.Error()
	case state == catalog.Ended && s.Instead != "":
		return state, "ended: run " + string(s.Instead)
	case state == catalog.Supported || state == catalog.Ending:
		return state, fmt.Sprintf("%s until %s, %d days", state, s.Until, days)
	default:
		return state, string(state)
	}
}
