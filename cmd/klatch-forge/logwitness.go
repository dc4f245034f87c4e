// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/witness"
	"klatch/internal/obs"
	"klatch/internal/translog"
)

func witnessCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "witness",
		Short: "Watch other people's logs and cosign what only grew",
		Long: `A witness remembers the largest checkpoint of each log and cosigns a new one only
if the log proves that it continues the old one. Run it where the publisher has
no rights: it is worth something only if it is not theirs
(docs/howto/run-a-witness.md). It speaks C2SP tlog-witness.`,
	}
	c.AddCommand(witnessInit(), witnessServe())
	return c
}

func witnessInit() *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:     "init DIR --name NAME",
		Short:   "Make a witness's key and print the verifier key",
		Example: "  klatch-forge log witness init /var/lib/klatch-witness --name witness.example.org/w1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := makeWitness(args[0], name)
			if err != nil {
				return cli.Cannot(err, "make a witness in %s", args[0])
			}
			out(cmd, "%s\n", key)
			return nil
		},
	}
	c.Flags().StringVar(&name, "name", "", "the witness's name, best an address without https:// (needed)")
	_ = c.MarkFlagRequired("name")
	return c
}

func makeWitness(dir, name string) (*translog.Verifier, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, witness.KeyFile)
	b, err := durable.ReadFile(file, 4<<10)
	if errors.Is(err, fs.ErrNotExist) {
		var secret string
		if secret, _, err = note.GenerateKey(rand.Reader, name); err != nil {
			return nil, fault.New(fault.Invalid, "bad_name", "%.80q cannot name a witness: %w", name, err).WithHint("use an address such as witness.example.org/w1")
		}
		b = []byte(secret + "\n")
		err = durable.WriteFile(file, b, 0o600)
	}
	if err != nil {
		return nil, err
	}
	s, err := translog.ParseSecret(string(b))
	if err != nil {
		return nil, err
	}
	if s.Witness().Name() != name {
		return nil, fault.New(fault.Conflict, "witness_exists", "folder has a witness %q already", s.Witness().Name())
	}
	return s.Witness(), nil
}

func witnessServe() *cobra.Command {
	var listen string
	var logs []string
	c := &cobra.Command{
		Use:   "serve DIR --log VKEY --listen ADDRESS",
		Short: "Answer logs that ask for a cosignature",
		Long: `Serves POST /add-checkpoint for the logs given, whose verifier keys their
publishers print with "klatch-forge log show". What is signed is on disk before.
Put a web server with TLS before it, or let only the publishers reach it.

Prints "ready ADDRESS" when it listens.`,
		Example: `  klatch-forge log witness serve /var/lib/klatch-witness --listen :8090 --log "example.org/log+1c2d3e4f+AT..."`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(serveWitness(cmd, args[0], logs, listen), "run the witness %s", args[0])
		},
	}
	c.Flags().StringVar(&listen, "listen", "127.0.0.1:8090", "address to listen on")
	c.Flags().StringArrayVar(&logs, "log", nil, "verifier key of a log; may be repeated (needed)")
	_ = c.MarkFlagRequired("log")
	return c
}

func serveWitness(cmd *cobra.Command, dir string, logs []string, listen string) error {
	w, err := witness.Open(dir, logs)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(cmd.Context(), "tcp", listen)
	if err != nil {
		return errors.Join(fault.New(fault.Unavailable, "cannot_listen", "%w", err), w.Close())
	}
	s := &http.Server{Handler: w.Handler(obs.NewJournal(cmd.ErrOrStderr(), 0)), ReadTimeout: 20 * time.Second, WriteTimeout: 20 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	out(cmd, "ready %s\n", l.Addr())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	select {
	case err = <-ended:
	case <-cmd.Context().Done():
		ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), 5*time.Second)
		defer cancel()
		err = s.Shutdown(ctx)
	}
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, w.Close())
}
