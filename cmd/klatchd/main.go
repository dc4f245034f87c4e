// SPDX-License-Identifier: Apache-2.0

// Command klatchd is the machine's daemon. It runs without privileges, asks
// the server, verifies what it is offered and leads each livepatch through its
// journey; what needs root it asks of klatch-loader. The journey itself is in
// internal/machine/agent.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/conf"
	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/loaderclient"
	"klatch/internal/machine/local"
	"klatch/internal/machine/remote"
	"klatch/internal/obs"
	"klatch/internal/rollout"
	"klatch/internal/trust"
)

// Set by the linker: the version, and when the source was committed (RFC 3339).
var (
	version = "dev"
	built   = ""
)

func main() { os.Exit(cli.Run(command())) }

// places are where the daemon finds things; only tests change them.
type places struct {
	root, state, socket, loader string
}

func command() *cobra.Command {
	var p places
	root := &cobra.Command{
		Use:   "klatchd",
		Short: "keep this machine's kernel live patched",
		Long: `klatchd asks the server for livepatches, verifies them and has them loaded.
It runs as user klatch without any privilege and is started by systemd.

Speak to it with klatch(1).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&p.root, "root", "/", "folder that holds proc, sys, etc and boot, for tests")
	serve := &cobra.Command{
		Use:     "serve",
		Short:   "run the daemon",
		Long:    "serve runs the daemon until SIGTERM. Systemd hands over its socket and is told\nwhen it is ready (sd_notify(3)).",
		Example: "  systemctl start klatchd",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cli.Cannot(serve(cmd.Context(), p), "run klatchd") },
	}
	serve.Flags().StringVar(&p.state, "state", "/var/lib/klatch", "folder of the journal and the credential")
	serve.Flags().StringVar(&p.socket, "socket", "", "listen here instead of on the socket that systemd hands over")
	serve.Flags().StringVar(&p.loader, "loader", loaderapi.SocketPath, "socket of klatch-loader")

	var asJSON bool
	config := &cobra.Command{
		Use:   "config",
		Short: "print every setting, its value and where it came from",
		Long: `config reads the drop-ins as the daemon does and prints what is in force.
Drop-ins are *.toml in /usr/lib/klatch/conf.d, /etc/klatch/conf.d and
/run/klatch/conf.d; the order is that of their names, a later one wins, and a
file masks one of the same name in an earlier folder. Changes need a restart:
systemctl restart klatchd.`,
		Example: "  klatchd config\n  echo 'soak = \"30m\"' > /etc/klatch/conf.d/50-local.toml && klatchd config",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cli.Cannot(printConfig(cmd, p, asJSON), "read the configuration")
		},
	}
	config.Flags().BoolVar(&asJSON, "json", false, "print JSON")

	root.AddCommand(serve, config, &cobra.Command{
		Use: "version", Short: "print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "klatchd", version)
			return err
		},
	})
	return root
}

// builtAt is when the source of this program was committed; zero: not known.
func builtAt() time.Time {
	t, err := time.Parse(time.RFC3339, built)
	if err != nil {
		return time.Time{}
	}
	return t
}

func serve(ctx context.Context, p places) error {
	set, _, err := readSettings(p.root)
	if err != nil {
		return err
	}
	// The daemon sleeps nearly always; a little more collecting keeps it small.
	debug.SetGCPercent(50)
	log := obs.NewJournal(os.Stderr, set.level)

	client, err := remoteIn(p, log)
	if err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		Dir: p.state, Version: version, Built: builtAt(), Policy: set.policy, Log: log,
		Machine:    facts.Machine{Root: p.root},
		Server:     client,
		Repository: remote.Repository{Client: client, Dir: filepath.Join(p.state, "metadata")},
		Loader:     loaderclient.Dial(p.loader),
		Anchor:     func() (*trust.Anchor, error) { return readAnchor(p.root) },
		Rollout:    remote.Rollout{Client: client, Dir: filepath.Join(p.state, "rollout")},
		Operator:   func() (*rollout.Anchor, error) { return readOperator(p.root) },
		Tier:       set.tier,
		Evidence:   set.proofs,
	})
	if err != nil {
		return err
	}
	l, err := listen(ctx, p.socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	api := make(chan error, 1)
	go func() {
		err := local.Serve(ctx, l, a, log)
		cancel() // without its API the daemon is not in order: systemd restarts it
		api <- err
	}()
	notify := func(state string) {
		// Nobody listens outside systemd; that is no error.
		_, _ = daemon.SdNotify(false, state)
	}
	notify(daemon.SdNotifyReady)
	err = a.Run(ctx, func() { notify(daemon.SdNotifyWatchdog) })
	notify(daemon.SdNotifyStopping)
	cancel()
	return errors.Join(err, <-api)
}

// listen takes the socket from systemd, or makes one where told to.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if path != "" {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		var lc net.ListenConfig
		return lc.Listen(ctx, "unix", path)
	}
	ls, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take the socket of systemd: %w", err)
	}
	if len(ls) != 1 || ls[0] == nil {
		return nil, fault.New(fault.Invalid, "no_socket", "systemd handed over %d sockets, want one", len(ls)).
			WithHint("start it with: systemctl start klatchd, or say --socket PATH")
	}
	return ls[0], nil
}

func printConfig(cmd *cobra.Command, p places, asJSON bool) error {
	_, all, err := readSettings(p.root)
	if err != nil {
		return err
	}
	w := cmd.OutOrStdout()
	if asJSON {
		return cli.WriteJSON(w, 1, struct {
			Settings []conf.Setting `json:"settings"`
		}{all})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range all {
		value, err := json.Marshal(s.Value)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(t, "%s = %s\t# %s\n", s.Key, value, s.Origin); err != nil {
			return err
		}
	}
	return t.Flush()
}
