// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/klpbuild"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/build/source"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
)

// newBuilder chooses the driver for a queue and a kernel, whose catalog entry
// names it, and makes its tools ready; the tools go into the plan. hand is nil
// where the queue holds source patches.
func newBuilder(cmd *cobra.Command, o *options, e catalog.Entry, hand *queue.Handwritten, limits *buildLimits) (build.Builder, map[string]string, error) {
	bounds, err := limits.sandbox()
	if err != nil {
		return nil, nil, err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return nil, nil, err
	}
	switch {
	case hand != nil && e.Builder == klpbuild.Name:
		return nil, nil, invalid("kernel %s is your own: hand-written livepatches are made for a distribution's kernels only", e.Release)(
			"put a source patch into the queue instead: klatch-forge queue add")
	case hand != nil:
		return &source.Driver{Cache: cache, Limits: bounds, Timeout: limits.timeout}, source.Version(), nil
	case e.Builder == "" || e.Builder == "objbuild":
		a, _, err := o.openArchive(cmd.Context(), string(e.Distro))
		if err != nil {
			return nil, nil, err
		}
		tools, err := objbuild.FetchTools(cmd.Context(), a, cache, o.console(cmd).progress())
		if err != nil {
			return nil, nil, err
		}
		return &objbuild.Driver{Cache: cache, Tools: tools, Limits: bounds, Timeout: limits.timeout}, tools.Version(), nil
	case e.Builder == klpbuild.Name:
		tools, err := klpbuild.Tools(cache, e)
		if err != nil {
			return nil, nil, err
		}
		return &klpbuild.Driver{Cache: cache, Limits: bounds, Timeout: limits.timeout}, tools, nil
	}
	return nil, nil, invalid("kernel %s wants builder %q, which this program does not have", e.Release, e.Builder)("use a newer klatch-forge")
}
