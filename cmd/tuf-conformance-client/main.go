// SPDX-License-Identifier: Apache-2.0

// Tuf-conformance-client puts package tufclient under the TUF conformance suite
// (github.com/theupdateframework/tuf-conformance), whose CLIENT-CLI.md says what
// the commands mean. It is a test tool and part of no package.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/durable"
	"klatch/internal/tufclient"
)

func main() {
	if err := root().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "tuf-conformance-client:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	var c tufclient.Conformance
	cmd := &cobra.Command{Use: "tuf-conformance-client", SilenceUsage: true, SilenceErrors: true}
	f := cmd.PersistentFlags()
	f.StringVar(&c.MetadataDir, "metadata-dir", "", "folder of trusted metadata")
	f.StringVar(&c.MetadataURL, "metadata-url", "", "address of the repository's metadata")
	f.StringVar(&c.Target, "target-name", "", "path of the target")
	f.StringVar(&c.TargetURL, "target-base-url", "", "address of the repository's targets")
	f.StringVar(&c.TargetDir, "target-dir", "", "folder for downloads")
	run := func(cmd *cobra.Command, _ []string) (err error) {
		if c.Now, err = now(cmd.Context()); err != nil {
			return err
		}
		return c.Run(cmd.Context())
	}
	cmd.AddCommand(&cobra.Command{Use: "init TRUSTED_ROOT", Args: cobra.ExactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		b, err := durable.ReadFile(args[0], 1<<20)
		if err != nil {
			return err
		}
		return durable.WriteFile(filepath.Join(c.MetadataDir, "root.json"), b, 0o600)
	}}, &cobra.Command{Use: "refresh", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, args []string) error {
		c.Target = ""
		return run(cmd, args)
	}}, &cobra.Command{Use: "download", Args: cobra.NoArgs, RunE: run})
	return cmd
}

// now is the time, or the one that faketime shows to programs of the C
// library: the suite moves the clock so, and Go asks the kernel itself.
func now(ctx context.Context) (time.Time, error) {
	if !strings.Contains(os.Getenv("LD_PRELOAD"), "faketime") {
		return time.Now(), nil
	}
	b, err := exec.CommandContext(ctx, "date", "+%s").Output()
	if err != nil {
		return time.Time{}, fmt.Errorf("ask date for the time: %w", err)
	}
	s, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return time.Unix(s, 0), err
}
