// SPDX-License-Identifier: Apache-2.0

// Command klatch-fleet is the fleet operator's tool: it asks the admin API of
// klatch-server. This folder is wiring; start with newRoot.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/notice"
	"klatch/internal/server/adminapi"
)

// version is set by the linker.
var version = "devel"

const rootHelp = `klatch-fleet shows and steers a fleet through the admin API of klatch-server.

The admin token, which klatch-server init made, comes from the file that
--token-file names, or from the environment variable KLATCH_ADMIN_TOKEN.`

// tokenEnv holds the admin token, for scripts.
const tokenEnv = "KLATCH_ADMIN_TOKEN" //nolint:gosec // a name, no secret

// callLimit bounds one call.
const callLimit = time.Minute

type options struct {
	server, tokenFile, ca string
}

func newRoot() *cobra.Command {
	var o options
	root := &cobra.Command{Use: "klatch-fleet", Short: "show and steer a fleet", Long: rootHelp, Args: cobra.NoArgs}
	f := root.PersistentFlags()
	f.StringVar(&o.server, "server", "http://127.0.0.1:8480", "admin address of klatch-server")
	f.StringVar(&o.tokenFile, "token-file", "", "file with the admin token")
	f.StringVar(&o.ca, "ca", "", "CA certificate of an https admin address (ca.crt of the server's data folder)")
	token := &cobra.Command{Use: "token", Short: "enrollment tokens", Args: cobra.NoArgs}
	token.AddCommand(tokenCommand(&o))
	root.AddCommand(tierCommand(&o), promoteCommand(&o), holdCommand(&o), releaseCommand(&o), draftCommand(&o), keysCommand(&o), auditCommand(&o))
	root.AddCommand(machinesCommand(&o), livepatchesCommand(&o), reportsCommand(&o), stallsCommand(&o), token, &cobra.Command{
		Use: "version", Short: "print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), version)
			return err
		},
	})
	return root
}

func main() { os.Exit(cli.Run(newRoot())) }

func (o *options) client() (*adminapi.Client, error) {
	token := os.Getenv(tokenEnv)
	if o.tokenFile != "" {
		b, err := durable.ReadFile(o.tokenFile, 4096)
		if err != nil {
			return nil, err
		}
		token = string(b)
	}
	if token = strings.TrimSpace(token); token == "" {
		return nil, fault.New(fault.Invalid, "no_token", "no admin token was given").
			WithHint("name its file with --token-file, or set %s", tokenEnv)
	}
	t := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13}}
	if o.ca != "" {
		b, err := durable.ReadFile(o.ca, 1<<20)
		if err != nil {
			return nil, err
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(b) {
			return nil, fault.New(fault.Invalid, "bad_ca", "%s holds no certificate", o.ca)
		}
	}
	return &adminapi.Client{BaseURL: o.server, Token: token, HTTP: &http.Client{Transport: t, Timeout: callLimit}}, nil
}

func machinesCommand(o *options) *cobra.Command {
	var asJSON, others bool
	var ending int
	c := &cobra.Command{
		Use: "machines", Short: "list the machines", Args: cobra.NoArgs,
		Long: `machines lists every machine with its state, what is loaded and when it was
last seen. A machine that was silent for three hours is marked.

With --ending N, only those whose kernel has ended or ends within N days, by what
the publisher told them: the forecast of kernel upgrades. Then the exit status is
4 where there is one, because somebody must act. Of machines that were told
nothing nothing is known; their number is printed.

With --apart, only those that were shown another world than the others: older
metadata than other machines had accepted three hours before, or a checkpoint of
the transparency log that has another root than the same size has elsewhere. Why
is printed for each, and the exit status is 4. A server that lies about one
machine cannot make it tell the others' versions, but it can keep its words back:
compare what klatch status --json says there (state.seen).`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "list machines")
			}
			list, err := client.Machines(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "list machines")
			}
			if ending > 0 {
				all := len(list)
				var unknown int
				list, unknown = forecast(list, ending, time.Now())
				fmt.Fprintf(cmd.ErrOrStderr(), "%d of %d machines must get another kernel within %d days; of %d nothing is known\n", len(list), all, ending, unknown) //nolint:errcheck // the list matters
			}
			if others {
				var why []string
				list, why = apart(list)
				fmt.Fprint(cmd.ErrOrStderr(), strings.Join(why, "")) //nolint:errcheck // the list matters
			}
			if err := printMachines(cmd, list, asJSON); err != nil {
				return err
			}
			if (ending > 0 || others) && len(list) > 0 {
				return cli.ExitWith(4)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the list for programs")
	c.Flags().BoolVar(&others, "apart", false, "only machines that were shown other metadata or another log than the others")
	c.Flags().IntVar(&ending, "ending", 0, "only machines whose kernel has ended or ends within this many days")
	return c
}

// forecast keeps the machines whose kernel has ended or ends within some days,
// and counts those of whose kernel nobody knows.
func forecast(list []adminapi.Machine, days int, now time.Time) (due []adminapi.Machine, unknown int) {
	due = []adminapi.Machine{}
	for _, m := range list {
		if m.State == nil || m.State.Notice == nil {
			unknown++
			continue
		}
		// The days are the publisher's; what is left of them is counted today.
		n := m.State.Notice
		state, left, err := notice.Support{Until: n.Until, Ended: n.Ended}.At(now)
		switch {
		case err != nil || state == notice.Unknown:
			unknown++
		case state == notice.Ended || left <= days:
			due = append(due, m)
		}
	}
	return due, unknown
}

func printMachines(cmd *cobra.Command, list []adminapi.Machine, asJSON bool) error {
	if asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"machines": list})
	}
	w := newTable(cmd.OutOrStdout(), "HOSTNAME", "MACHINE", "KERNEL", "LIVEPATCH", "FIXES", "STATE", "REBOOT", "LAST SEEN")
	for _, m := range list {
		w.row(row(m)...)
	}
	return w.end()
}

func row(m adminapi.Machine) []any {
	out := []any{"-", m.ID, "-", "-", "-", "enrolled", "-", m.LastSeen.UTC().Format(time.RFC3339)}
	if m.Facts != nil {
		out[0], out[2] = oneWord(m.Facts.Hostname), string(m.Facts.Kernel.Release)
	}
	if s := m.State; s != nil {
		out[3], out[4], out[5], out[6] = fmt.Sprint(s.Sequence), countFixes(s.Fixes), oneWord(s.State), oneWord(s.Advice)
	}
	if m.Stale {
		out[7] = fmt.Sprint(out[7], " (silent)")
	}
	return out
}

// oneWord keeps what a machine says of itself in its column: it may be hostile.
func oneWord(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) || unicode.IsSpace(r) {
			return '?'
		}
		return r
	}, s)
}

func countFixes(fixes []livepatch.Fix) string {
	unchecked := 0
	for _, f := range fixes {
		if f.Check != livepatch.Passed {
			unchecked++
		}
	}
	if unchecked == 0 {
		return fmt.Sprint(len(fixes))
	}
	return fmt.Sprintf("%d (%d unchecked)", len(fixes), unchecked)
}

func livepatchesCommand(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "livepatches", Short: "list what is published", Args: cobra.NoArgs,
		Long: "livepatches lists what the publisher's repository offers, as this server\nverified it.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "list livepatches")
			}
			l, err := client.Livepatches(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "list livepatches")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{
					"publisher": l.Publisher, "metadata_version": l.Metadata, "metadata_expires": l.Expires, "problems": l.Problems, "livepatches": l.Livepatches, "left_out": l.LeftOut,
				})
			}
			w := newTable(cmd.OutOrStdout(), "KERNEL", "BUILD", "SEQUENCE", "FIXES", "FUNCTIONS", "BYTES")
			for _, e := range l.Livepatches {
				w.row(e.Kernel.Release, e.Kernel.ID.Short(), e.Sequence, countFixes(e.Fixes), e.Functions, e.Bytes)
			}
			for _, p := range l.Problems {
				fmt.Fprintf(cmd.ErrOrStderr(), "damaged: %s\n", p) //nolint:errcheck // the list matters
			}
			if n := len(l.LeftOut); n > 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "left out: %d more are signed and not on this server; klatch-server status says why\n", n) //nolint:errcheck // as above
			}
			return w.end()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the list for programs")
	return c
}

func reportsCommand(o *options) *cobra.Command {
	var machine string
	var limit int
	var asJSON bool
	c := &cobra.Command{
		Use: "reports", Short: "show the newest reports", Args: cobra.NoArgs,
		Long: "reports shows what machines reported, newest first.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "show reports")
			}
			l, err := client.Reports(cmd.Context(), machine, limit)
			if err != nil {
				return cli.Cannot(err, "show reports")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"reports": l.Reports})
			}
			w := newTable(cmd.OutOrStdout(), "AT", "HOSTNAME", "EVENT", "SEQUENCE", "TOOK", "CODE", "TEXT")
			for _, r := range l.Reports {
				q := r.Report
				w.row(q.At.UTC().Format(time.RFC3339), quoted(q.Facts.Hostname), q.Event, q.Sequence, fmt.Sprintf("%d ms", q.Took), q.Code, quoted(q.Text))
			}
			return w.end()
		},
	}
	c.Flags().StringVar(&machine, "machine", "", "of this machine id only")
	c.Flags().IntVar(&limit, "limit", 50, "how many, at most 1000")
	c.Flags().BoolVar(&asJSON, "json", false, "print the list for programs")
	return c
}

func tokenCommand(o *options) *cobra.Command {
	var order adminapi.TokenOrder
	var expires time.Duration
	var asJSON bool
	c := &cobra.Command{
		Use: "create", Short: "make an enrollment token", Args: cobra.NoArgs,
		Long:    "create makes a token with which a machine enrolls, and prints it once.",
		Example: "  klatch-fleet token create --uses 50 --expires 72h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "make a token")
			}
			order.Seconds = int64(expires / time.Second)
			t, err := client.CreateToken(cmd.Context(), order)
			if err != nil {
				return cli.Cannot(err, "make a token")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"token": t.Secret, "tier": t.Tier, "uses": t.Uses, "expires": t.Expires})
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "for %d machine(s) of tier %s, until %s:\n", t.Uses, t.Tier, t.Expires.Format(time.RFC3339)) //nolint:errcheck // the token matters
			_, err = fmt.Fprintln(cmd.OutOrStdout(), t.Secret)
			return err
		},
	}
	f := c.Flags()
	f.IntVar(&order.Uses, "uses", 1, "how many machines may use it")
	f.DurationVar(&expires, "expires", 24*time.Hour, "how long it can be used")
	f.StringVar(&order.Tier, "tier", "", "tier of the machines (default: stable)")
	f.BoolVar(&asJSON, "json", false, "print it for programs")
	return c
}
