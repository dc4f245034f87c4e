// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/server/repo"
	"klatch/internal/tufclient"
)

const syncHelp = `sync copies what the publisher has signed into this server. The metadata and
every livepatch are verified against the trust anchor first; when one file is
broken it is named, and the fleet keeps seeing the old state. A sync that was
stopped goes on where it was.

--from is an http or https address or a folder, with metadata/ and targets/
below it. Without it the address given to init is used.`

func syncCommand(dir *string) *cobra.Command {
	var from string
	var asJSON bool
	c := &cobra.Command{
		Use:     "sync [--from DIR|URL]",
		Short:   "copy the publisher's repository",
		Long:    syncHelp,
		Example: "  klatch-server sync --from https://publisher.example.org/klatch\n  klatch-server sync --from /mnt/stick/repository",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := openData(*dir)
			if err != nil {
				return cli.Cannot(err, "sync")
			}
			if from == "" {
				from = d.Upstream
			}
			if from == "" {
				return cli.Cannot(fault.New(fault.Invalid, "no_source", "no source was given").WithHint("say where the publisher's repository is: --from DIR|URL"), "sync")
			}
			r := d.repo(slog.New(slog.DiscardHandler)) // errors are in the result
			// A copy that cannot be read is no reason to stop: it is made anew.
			if err := r.Load(cmd.Context(), time.Now()); err != nil && cmd.Context().Err() != nil {
				return cli.Cannot(err, "sync from %s", from)
			}
			res, err := syncFrom(cmd.Context(), r, from)
			if err != nil {
				return cli.Cannot(err, "sync from %s", from)
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, struct {
					Changed     bool      `json:"changed"`
					Copied      int       `json:"copied"`
					Kept        int       `json:"kept"`
					Livepatches int       `json:"livepatches"`
					Metadata    int64     `json:"metadata_version"`
					Expires     time.Time `json:"metadata_expires"`
				}{res.Changed, res.Copied, res.Kept, res.Livepatches, res.Version, res.Expires})
			}
			what := "already newest"
			if res.Changed {
				what = fmt.Sprintf("%d copied, %d kept", res.Copied, res.Kept)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d livepatches, metadata %d until %s: %s\n", res.Livepatches, res.Version, res.Expires.UTC().Format(time.RFC3339), what)
			return err
		},
	}
	c.Flags().StringVar(&from, "from", "", "address or folder of the publisher's repository")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

func syncFrom(ctx context.Context, r *repo.Repo, from string) (repo.Result, error) {
	// Whole answers are bounded by package tufclient; these bound the parts in
	// which nothing arrives.
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 20 * time.Second,
		ResponseHeaderTimeout: time.Minute, IdleConnTimeout: time.Minute,
	}
	defer t.CloseIdleConnections()
	base, client, err := tufclient.Source(from, &http.Client{Transport: t})
	if err != nil {
		return repo.Result{}, err
	}
	return r.Sync(ctx, base, client, time.Now())
}
