// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/build/source"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/queue"
)

// newBuilder chooses the driver for a kernel and a queue and makes its tools
// ready; the tools go into the plan. hand is nil where the queue holds source
// patches.
func newBuilder(cmd *cobra.Command, o *options, e catalog.Entry, hand *queue.Handwritten, limits *buildLimits) (build.Builder, map[string]string, error) {
	bounds, err := limits.sandbox()
	if err != nil {
		return nil, nil, err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return nil, nil, err
	}
	if hand != nil {
		return &source.Driver{Cache: cache, Limits: bounds, Timeout: limits.timeout}, source.Version(), nil
	}
	a, _, err := o.openArchive(cmd.Context(), string(e.Distro))
	if err != nil {
		return nil, nil, err
	}
	tools, err := objbuild.FetchTools(cmd.Context(), a, cache, o.console(cmd).progress())
	if err != nil {
		return nil, nil, err
	}
	return &objbuild.Driver{Cache: cache, Tools: tools, Limits: bounds, Timeout: limits.timeout}, tools.Version(), nil
}
