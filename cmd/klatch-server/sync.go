// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/api"
	"klatch/internal/server/repo"
	"klatch/internal/server/upstream"
	"klatch/internal/tufclient"
)

const syncHelp = `sync copies what the publisher has signed into this server. The metadata and
every livepatch are verified against the trust anchor first; when one file is
broken it is named, and the fleet keeps seeing the old state. A sync that was
stopped goes on where it was. It may run beside serve, which notices.

Livepatches that the filter or the minimum age of "klatch-server configure"
leave out are not copied, and are named. Metadata and recalls are always copied.

--from is an http or https address or a folder, with metadata/ and targets/
below it. Without it the address given to init or configure is used.`

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
			r, err := d.repo(cmd.Context(), slog.New(slog.DiscardHandler)) // errors are in the result
			if err != nil {
				return cli.Cannot(err, "sync from %s", from)
			}
			// A copy that cannot be read is no reason to stop: it is made anew.
			if err := r.Load(cmd.Context(), time.Now()); err != nil && cmd.Context().Err() != nil {
				return cli.Cannot(err, "sync from %s", from)
			}
			res, err := syncFrom(cmd.Context(), d, r, from, progress(cmd.ErrOrStderr()))
			if err != nil {
				return cli.Cannot(err, "sync from %s", from)
			}
			return printSync(cmd.OutOrStdout(), res, asJSON)
		},
	}
	c.Flags().StringVar(&from, "from", "", "address or folder of the publisher's repository")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

// progress tells a person of each file that is fetched.
func progress(w io.Writer) func(done, total int, t tufclient.Target) {
	p := cli.NewProgress(w)
	return func(done, total int, t tufclient.Target) {
		p.Step("%d of %d: %s (%d bytes)", done+1, total, t.Path, t.Bytes)
	}
}

// printLeftOut names what is left out; a long list is cut.
func printLeftOut(w io.Writer, list []repo.LeftOut) {
	const most = 20
	for i, l := range list {
		if i == most {
			fmt.Fprintf(w, "left out: %d more; --json has all\n", len(list)-most) //nolint:errcheck // told as far as possible
			return
		}
		fmt.Fprintf(w, "left out: %s\n", l.Text()) //nolint:errcheck // as above
	}
}

func printSync(w io.Writer, res repo.Result, asJSON bool) error {
	if asJSON {
		return cli.WriteJSON(w, 1, struct {
			Changed     bool               `json:"changed"`
			Copied      int                `json:"copied"`
			Kept        int                `json:"kept"`
			Livepatches int                `json:"livepatches"`
			Recalls     int64              `json:"recalls_version"`
			Metadata    int64              `json:"metadata_version"`
			Expires     time.Time          `json:"metadata_expires"`
			LeftOut     []adminapi.LeftOut `json:"left_out"`
		}{res.Changed, res.Copied, res.Kept, res.Livepatches, res.Recalls, res.Version, res.Expires, api.LeftOut(res.LeftOut)})
	}
	what := "already newest"
	if res.Changed {
		what = fmt.Sprintf("%d copied, %d kept", res.Copied, res.Kept)
	}
	if _, err := fmt.Fprintf(w, "%d livepatches, metadata %d until %s: %s\n", res.Livepatches, res.Version, res.Expires.UTC().Format(time.RFC3339), what); err != nil {
		return err
	}
	printLeftOut(w, res.LeftOut)
	return nil
}

// lastSync is what came of the newest attempt, for status.
type lastSync struct {
	Format string     `json:"format"`
	From   string     `json:"from"`
	At     time.Time  `json:"at"`
	GoodAt time.Time  `json:"good_at,omitzero"`
	Code   fault.Code `json:"code,omitempty"`
	Text   string     `json:"text,omitempty"`
	Hint   string     `json:"hint,omitempty"`
}

const (
	lastSyncFile   = "last-sync.json"
	lastSyncFormat = "klatch-last-sync/1"
)

// readLastSync gives what status shows. Nothing depends on the file, so one
// that cannot be read is as good as none.
func (d *data) readLastSync() lastSync {
	var l lastSync
	b, err := durable.ReadFile(d.path(lastSyncFile), maxSettings)
	if err != nil || json.Unmarshal(b, &l) != nil || l.Format != lastSyncFormat {
		return lastSync{}
	}
	return l
}

func (d *data) noteSync(from string, at time.Time, outcome error) error {
	l := lastSync{Format: lastSyncFormat, From: from, At: at.UTC(), GoodAt: d.readLastSync().GoodAt}
	if outcome == nil {
		l.GoodAt = l.At
	} else {
		l.Code, l.Text, l.Hint = fault.CodeOf(outcome), outcome.Error(), fault.HintOf(outcome)
	}
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(d.path(lastSyncFile), append(b, '\n'), 0o600)
}

// syncFrom copies once, by the settings of the moment.
func syncFrom(ctx context.Context, d *data, r *repo.Repo, from string, tell func(done, total int, t tufclient.Target)) (repo.Result, error) {
	now := time.Now()
	res, err := syncOnce(ctx, d, r, from, now, tell)
	if ctx.Err() != nil {
		return res, err
	}
	return res, errors.Join(err, d.noteSync(from, now, err))
}

func syncOnce(ctx context.Context, d *data, r *repo.Repo, from string, now time.Time, tell func(done, total int, t tufclient.Target)) (repo.Result, error) {
	s, err := readSettings(d.dir) // configure may have changed them since the start
	if err != nil {
		return repo.Result{}, err
	}
	base, client, done, err := d.source(ctx, from)
	if err != nil {
		return repo.Result{}, err
	}
	defer done()
	if strings.HasPrefix(base, "http") { // not a folder
		saving := *client
		saving.Transport = tufclient.Saver{Next: client.Transport, Dir: filepath.Join(d.path(memoryDir), "transfer")}
		client = &saving
	}
	install, broken := d.fetchTiers(ctx, s, from, base, client, now)
	res, err := r.Sync(ctx, repo.Source{BaseURL: base, Client: client, Rules: s.rules(), Progress: tell}, now)
	// Each of the two is as good without the other: a hold must arrive where a
	// livepatch is broken, and a recall where the tiers are.
	return res, errors.Join(err, broken, install())
}

// source makes the client for a source. Whole answers are bounded by package
// tufclient; the limits here bound the parts in which nothing arrives.
func (d *data) source(ctx context.Context, from string) (base string, client *http.Client, done func(), err error) {
	above, err := upstream.Open(d.path(upstreamFile))
	if err != nil {
		return "", nil, nil, err
	}
	if above != nil && above.Serves(from) {
		client, err = above.HTTP(ctx, time.Now())
		// The certificate that could not be renewed may still be good.
		if err != nil && !time.Now().Before(above.Expires()) {
			return "", nil, nil, err
		}
		return above.Server(), client, client.CloseIdleConnections, nil
	}
	t := plainTransport()
	base, client, err = tufclient.Source(from, &http.Client{Transport: t, CheckRedirect: sameHost})
	return base, client, t.CloseIdleConnections, err
}

func plainTransport() *http.Transport {
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 20 * time.Second,
		ResponseHeaderTimeout: time.Minute, IdleConnTimeout: time.Minute,
	}
}

// sameHost refuses to be sent elsewhere: the owner named one place, and what
// it sees of us, it alone should see. From http to https is allowed.
func sameHost(q *http.Request, via []*http.Request) error {
	from := via[0].URL
	switch {
	case len(via) > 5:
		return errors.New("more than five redirects")
	case q.URL.Hostname() != from.Hostname() || from.Scheme == "https" && q.URL.Scheme != "https":
		return fmt.Errorf("redirect to %s, which is not the source that was named", q.URL.Redacted())
	}
	return nil
}
