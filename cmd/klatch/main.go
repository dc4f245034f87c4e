// SPDX-License-Identifier: Apache-2.0

// Command klatch is what the owner of a machine types. It shows what klatchd
// knows, enrolls the machine, installs the trust anchor, and speaks to
// klatch-loader directly where the daemon is not needed.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/local"
)

// version is set by the linker.
var version = "dev"

func main() { os.Exit(cli.Run(command())) }

// places are where the program finds things; only tests change them.
type places struct {
	root, daemon, loader string
}

func (p *places) klatchd() *local.Client { return local.Dial(p.daemon) }

func command() *cobra.Command {
	p := &places{}
	root := &cobra.Command{
		Use:   "klatch",
		Short: "see and steer the live patching of this machine's kernel",
		Long: `klatch shows whether the running kernel is live patched, and what to do if it
is not. Everybody may look; what changes something is for root.

Exit statuses: 0 done; 1 our bug or a broken machine; 2 asked for something
impossible; 3 refused, nothing changed; 4 (status --check) a person must act;
75 try again later. klatch advice has its own.`,
		Example: "  klatch status\n  klatch enroll --server https://klatch.example.org:8443 --token-file token\n  klatch check",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	f := root.PersistentFlags()
	f.StringVar(&p.root, "root", "/", "folder that holds etc, for tests")
	f.StringVar(&p.daemon, "daemon", local.SocketPath, "socket of klatchd, for tests")
	f.StringVar(&p.loader, "loader", loaderapi.SocketPath, "socket of klatch-loader, for tests")
	for _, name := range []string{"root", "daemon", "loader"} {
		if err := f.MarkHidden(name); err != nil {
			panic(err) // the flag is defined three lines above
		}
	}
	root.AddCommand(statusCommand(p), checkCommand(p), historyCommand(p), adviceCommand(p), retryCommand(p), resumeCommand(p),
		enrollCommand(p), trustCommand(p), disableCommand(p), blockersCommand(p), &cobra.Command{
			Use: "version", Short: "print the version", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "klatch", version)
				return err
			},
		})
	return root
}
