// SPDX-License-Identifier: Apache-2.0

package main

import (
	"path/filepath"

	"github.com/spf13/cobra"

	"klatch/internal/forge/build/klpbuild"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/kernel"
)

// addOwnKernel adds a kernel that somebody built himself: source, config and
// vmlinux are his, and klp-build of his own source makes the livepatches.
func addOwnKernel(cmd *cobra.Command, o *options, own kerneltree.Own, ccache string) (catalog.Entry, error) {
	if own.Config == "" || own.Vmlinux == "" {
		return catalog.Entry{}, invalid("--tree needs --config and --vmlinux")(
			"klatch-forge kernel add --tree DIR --config DIR/.config --vmlinux DIR/vmlinux --image DIR/arch/x86/boot/bzImage")
	}
	if own.Release != "" {
		if _, err := kernel.ParseRelease(string(own.Release)); err != nil {
			return catalog.Entry{}, err
		}
	}
	if own.Series != "" && !seriesName.MatchString(own.Series) {
		return catalog.Entry{}, invalid("%q cannot name a queue", own.Series)("use letters, digits, dots and dashes, such as own-7.2")
	}
	d, err := o.data()
	if err != nil {
		return catalog.Entry{}, err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return catalog.Entry{}, err
	}
	if ccache != "" {
		if ccache, err = filepath.Abs(ccache); err != nil {
			return catalog.Entry{}, err
		}
	}
	c := o.console(cmd)
	own.Builder = klpbuild.Name
	e, err := kerneltree.Maker{Cache: cache, Distro: kerneltree.OwnDistro, Step: c.step, Say: c.say}.AddOwn(cmd.Context(), own)
	if err != nil {
		return e, err
	}
	if _, err := (&klpbuild.Driver{Cache: cache, CCache: ccache}).Prepare(cmd.Context(), e, c.step); err != nil {
		return e, err
	}
	if own.Image == "" {
		c.say("no --image: livepatches of this kernel can be built, but not tried in the lab")
	}
	return e, catalog.Save(d.Path, e)
}
