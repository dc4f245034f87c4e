// SPDX-License-Identifier: Apache-2.0

// Command klatch-server serves the publisher's signed repository to a fleet,
// enrolls its machines, takes their reports and shows them on a page. It holds
// no publisher key. This folder is wiring; start with newRoot.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
)

// version is set by the linker.
var version = "devel"

const rootHelp = `klatch-server gives a fleet its livepatches: it copies what a publisher has
signed, enrolls machines, takes their reports and shows them on a page. It
holds no publisher key: whoever owns it can delay a livepatch, never forge one.

First steps:

  klatch-server init --name klatch.example.org --anchor anchor.json
  klatch-server sync --from https://publisher.example.org/klatch
  klatch-server serve
  klatch-server token create`

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "klatch-server",
		Short: "serve livepatches to a fleet",
		Long:  rootHelp,
		Args:  cobra.NoArgs,
	}
	dir := root.PersistentFlags().String("data", "/var/lib/klatch-server", "folder of the server's data")
	root.AddCommand(initCommand(dir), serveCommand(dir), syncCommand(dir), configureCommand(dir), statusCommand(dir), joinCommand(dir), mirrorsCommand(dir), exportCommand(dir), importCommand(dir), storageCommand(dir), fetchCommand(), tokenCommand(dir), migrateCommand(dir), rolloutCommand(dir), &cobra.Command{
		Use:   "version",
		Short: "print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), version)
			return err
		},
	})
	return root
}

func main() { os.Exit(cli.Run(newRoot())) }
