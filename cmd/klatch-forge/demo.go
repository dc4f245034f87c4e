// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/demo"
)

func demoCommand(o *options) *cobra.Command {
	var keep bool
	var source string
	c := &cobra.Command{
		Use:   "demo",
		Short: "Tell the whole story on this machine, with a real kernel in a VM",
		Long: `Makes a publisher, a server and a Debian machine, takes two real fixes to that
machine, reboots it, and ends with a summary. Everything is made in a temporary
folder and removed; downloads and images stay in the cache. Needs root and the
programs and packages that "make demo" builds.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cli.Cannot(runDemo(cmd, o, source, keep), "finish the demo")
		},
	}
	c.Flags().BoolVar(&keep, "keep", false, "leave server and machine running until Ctrl-C")
	c.Flags().StringVar(&source, "source", ".", "Klatch's own source folder, with bin/ and dist/out/")
	return c
}

func runDemo(cmd *cobra.Command, o *options, source string, keep bool) error {
	cache, err := o.cacheDir()
	if err != nil {
		return err
	}
	if source, err = filepath.Abs(source); err != nil {
		return err
	}
	a, _, err := o.openArchive(cmd.Context(), "debian")
	if err != nil {
		return err
	}
	rig, err := newRig(cache)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "klatch-demo-")
	if err != nil {
		return err
	}
	d := &demo.Demo{Source: source, Bin: filepath.Join(source, "bin"), Debs: filepath.Join(source, "dist", "out"), Work: work,
		Cache: cache, Keep: keep, Rig: rig, Archive: a, Out: cmd.OutOrStdout()}
	return d.Run(cmd.Context())
}
