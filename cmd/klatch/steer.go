// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderclient"
	"klatch/internal/machine/local"
	"klatch/internal/wire"
)

// maxToken limits what is read as a token, in bytes; one has under 100.
const maxToken = 4 << 10

func enrollCommand(p *places) *cobra.Command {
	var server, token, file string
	c := &cobra.Command{
		Use:   "enroll --server URL",
		Short: "make this machine known to a server, with a token",
		Long: `enroll exchanges a token for this machine's own credential, which klatchd keeps.
The token names the authority of its server, so it is told to no other. It comes
from --token-file, from standard input, or from --token (which other users of
the machine can see while the command runs).`,
		Example: "  klatch enroll --server https://klatch.example.org:8443 --token-file token\n  klatch enroll --server https://klatch.example.org:8443 < token",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := readToken(cmd, token, file)
			if err != nil {
				return cli.Cannot(err, "enroll this machine")
			}
			id, err := p.klatchd().Enroll(cmd.Context(), local.EnrollRequest{Server: server, Token: t})
			if err != nil {
				return cli.Cannot(err, "enroll this machine")
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "enrolled as %s in tier %s at %s\nnext: klatch check\n", id.MachineID, id.Tier, id.Server)
			return err
		},
	}
	c.Flags().StringVar(&server, "server", "", "address of the server, https://HOST:PORT")
	c.Flags().StringVar(&token, "token", "", "the token itself")
	c.Flags().StringVar(&file, "token-file", "", "file that holds the token; - is standard input")
	if err := c.MarkFlagRequired("server"); err != nil {
		panic(err) // the flag is defined above
	}
	c.MarkFlagsMutuallyExclusive("token", "token-file")
	return c
}

func readToken(cmd *cobra.Command, token, file string) (wire.Token, error) {
	var b []byte
	var err error
	switch {
	case token != "":
		return wire.Token(token), nil
	case file != "" && file != "-":
		b, err = durable.ReadFile(file, maxToken)
	default:
		b, err = durable.ReadLimited(cmd.InOrStdin(), "standard input", maxToken)
	}
	if err != nil {
		return "", fault.New(fault.Invalid, "token_unreadable", "read token: %w", err)
	}
	t := wire.Token(strings.TrimSpace(string(b)))
	if t == "" {
		return "", fault.New(fault.Invalid, "token_empty", "the token is empty").WithHint("get one from whoever runs the server")
	}
	return t, nil
}

func disableCommand(p *places) *cobra.Command {
	var untilReboot bool
	c := &cobra.Command{
		Use:   "disable --until-reboot",
		Short: "take the livepatch out now, until the next reboot",
		Long: `disable is for the moment when a livepatch does harm. It takes the livepatch out
of the running kernel; the flaws that it fixed are open again. Nothing is loaded
until the next boot. It speaks to klatch-loader and needs neither klatchd nor a
server.

To keep it out over reboots too: touch /etc/klatch/off, or boot with klatch=off.`,
		Example: "  klatch disable --until-reboot",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !untilReboot {
				return cli.Cannot(fault.New(fault.Invalid, "say_so", "the fixes of the livepatch will be gone").
					WithHint("say that you mean it: klatch disable --until-reboot"), "disable the livepatch")
			}
			before, err := loaderclient.Dial(p.loader).Status(cmd.Context())
			if err == nil {
				_, err = loaderclient.Dial(p.loader).Disable(cmd.Context())
			}
			if err != nil {
				return cli.Cannot(err, "disable the livepatch")
			}
			what := "no livepatch was loaded; none will be"
			if before.Loaded != nil {
				what = fmt.Sprintf("livepatch %d is out; nothing will be loaded", before.Loaded.Sequence)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s until the next reboot\n", what)
			return err
		},
	}
	c.Flags().BoolVar(&untilReboot, "until-reboot", false, "yes, until the next reboot")
	return c
}

func blockersCommand(p *places) *cobra.Command {
	return &cobra.Command{
		Use:   "blockers",
		Short: "list the tasks that keep a transition from finishing",
		Long: `blockers lists the tasks that still run the old code while a transition is
under way, with the kernel function they are in and why they are not moved:

  kernel_thread                 a kernel thread; no signal moves it
  sleeping_in_patched_function  asleep in a function that is being replaced
  running                       on a processor, or ready for one
  unreliable_stack              asleep, with a stack that the kernel cannot trust
  unknown                       its stack could not be read

For root. What kept the last transition from finishing stays in klatch status.`,
		Example: "  klatch blockers",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return cli.Cannot(fault.New(fault.Denied, "root_only", "the loader answers root only").WithHint("repeat it with sudo"), "list the blocking tasks")
			}
			bs, err := loaderclient.Dial(p.loader).Blockers(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "list the blocking tasks")
			}
			w := cmd.OutOrStdout()
			if len(bs) == 0 {
				_, err = fmt.Fprintln(w, "no task blocks a transition")
				return err
			}
			replaced, err := facts.Machine{Root: p.root}.Replaced()
			if err != nil {
				return cli.Cannot(err, "list the functions that are being replaced")
			}
			return printBlockers(w, bs, replaced)
		},
	}
}
