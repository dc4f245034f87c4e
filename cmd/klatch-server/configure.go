// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/api"
	"klatch/internal/server/repo"
	"klatch/internal/tufclient"
)

const configureHelp = `configure changes what this server copies, and prints what is in force. Only
the flags that are given change; an empty value clears a list. A running serve
takes it at its next copy, at the latest after the interval.

The filter chooses livepatches by kernel; its lists are joined by "and", values
in a list by "or". Metadata, recalls and notices are always copied, so a
machine is told that its kernel is filtered away, and a recall reaches all.

--min-age waits until a livepatch was released that long ago, by the time in
the publisher's signed list. Recalls and metadata never wait.

--rollout upstream takes tiers and promotions from the server above, as its
operator's people signed them, and refuses to change them here. It needs their
anchor the first time, --rollout-anchor FILE; then restart klatch-server serve.`

// filterFlags are those of a filter, with one meaning in every command.
func filterFlags(f *pflag.FlagSet, x *repo.Filter) {
	f.StringSliceVar(&x.Distros, "distro", nil, "only this distribution, such as debian-12 or debian-*; repeatable")
	f.StringSliceVar(&x.Arches, "arch", nil, "only this architecture, such as amd64; repeatable")
	f.StringSliceVar(&x.Series, "series", nil, "only this kernel series, such as 6.1; repeatable")
	f.StringSliceVar(&x.MinKernels, "min-kernel", nil, "only this kernel and newer ones, such as 6.1.0-40; one for each series")
	f.StringSliceVar(&x.Kernels, "kernel", nil, "only these releases, such as '*-cloud-amd64'; repeatable")
}

func configureCommand(dir *string) *cobra.Command {
	var filter repo.Filter
	var upstream, tiers, tiersAnchor string
	var minAge, interval time.Duration
	var asJSON, closed bool
	c := &cobra.Command{
		Use:     "configure",
		Short:   "change what this server copies",
		Long:    configureHelp,
		Example: "  klatch-server configure --distro debian-12 --series 6.1 --kernel '*-cloud-amd64'\n  klatch-server configure --min-age 48h\n  klatch-server configure --kernel ''",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readSettings(*dir)
			if err != nil {
				return cli.Cannot(err, "change the settings")
			}
			f := cmd.Flags()
			for name, pair := range map[string]struct{ to, from *[]string }{
				"distro": {&s.Filter.Distros, &filter.Distros}, "arch": {&s.Filter.Arches, &filter.Arches}, "series": {&s.Filter.Series, &filter.Series},
				"min-kernel": {&s.Filter.MinKernels, &filter.MinKernels}, "kernel": {&s.Filter.Kernels, &filter.Kernels},
			} {
				if f.Changed(name) {
					*pair.to = *pair.from
				}
			}
			if f.Changed("min-age") {
				s.MinAge = duration(minAge)
			}
			if f.Changed("interval") {
				if interval < minInterval || interval > maxInterval {
					return cli.Cannot(fault.New(fault.Invalid, "bad_interval", "interval %s: want %s to %s", interval, minInterval, maxInterval), "change the settings")
				}
				s.Interval = duration(interval)
			}
			if f.Changed("closed") {
				s.Closed = closed
			}
			if f.Changed("upstream") {
				if upstream != "" {
					if _, _, err := tufclient.Source(upstream, nil); err != nil {
						return cli.Cannot(err, "change the settings")
					}
				}
				s.Upstream = upstream
			}
			if f.Changed("rollout") || tiersAnchor != "" {
				if err := setRollout(cmd.Context(), *dir, &s, cmp.Or(tiers, s.Rollout), tiersAnchor); err != nil {
					return cli.Cannot(err, "change the settings")
				}
			}
			if err := s.rules().Validate(); err != nil {
				return cli.Cannot(err, "change the settings")
			}
			if err := writeSettings(*dir, s); err != nil {
				return cli.Cannot(err, "change the settings")
			}
			return printSettings(cmd.OutOrStdout(), s, asJSON)
		},
	}
	f := c.Flags()
	filterFlags(f, &filter)
	f.DurationVar(&minAge, "min-age", 0, "copy livepatches only when they were released this long ago; 0: at once")
	f.DurationVar(&interval, "interval", defaultInterval, "time between two copies of a running serve")
	f.StringVar(&upstream, "upstream", "", "where serve copies from: an address or a folder; empty: by hand only")
	f.BoolVar(&closed, "closed", false, "serve the repository to machines and mirrors of this server only; --closed=false: to anybody")
	f.StringVar(&tiers, "rollout", "", "whose tiers: local, of this server's operator, or upstream; restart serve then")
	f.StringVar(&tiersAnchor, "rollout-anchor", "", "rollout.json of the operator whose tiers are followed")
	f.BoolVar(&asJSON, "json", false, "print the settings for programs")
	return c
}

// Limits of the interval. Below, a herd of mirrors would be a load on its
// source; above, a recall would come too late.
const (
	defaultInterval = 5 * time.Minute
	minInterval     = time.Second
	maxInterval     = 24 * time.Hour
)

func (s settings) interval() time.Duration {
	if s.Interval == 0 {
		return defaultInterval
	}
	return time.Duration(s.Interval)
}

// shown is the part of the settings that says what is copied.
type shown struct {
	Upstream string      `json:"upstream"`
	Interval string      `json:"sync_interval"`
	Filter   repo.Filter `json:"filter"`
	MinAge   string      `json:"min_age"`
	Closed   bool        `json:"closed"`
	Storage  string      `json:"storage"`
	Rollout  string      `json:"rollout"`
}

func (s settings) shown() shown {
	return shown{s.Upstream, s.interval().String(), s.Filter, time.Duration(s.MinAge).String(), s.Closed, s.Storage, cmp.Or(s.Rollout, rolloutLocal)}
}

func printSettings(w io.Writer, s settings, asJSON bool) error {
	if asJSON {
		return cli.WriteJSON(w, 1, s.shown())
	}
	from := s.Upstream
	if from == "" {
		from = "nowhere; by hand only"
	}
	age := "at once"
	if s.MinAge != 0 {
		age = time.Duration(s.MinAge).String() + " after their release"
	}
	who := "anybody"
	if s.Closed {
		who = "machines and mirrors of this server"
	}
	tiers := "local"
	if s.Rollout == rolloutUpstream {
		tiers = "followed from upstream"
	}
	_, err := fmt.Fprintf(w, "copies from:  %s, every %s\nlivepatches:  %s\ntaken:        %s\nserves:       %s\nkept in:      %s\ntiers:        %s\n",
		from, s.interval(), s.Filter, age, who, cmp.Or(s.Storage, "the data folder"), tiers)
	return err
}

const statusHelp = `status says what this server copies and from where, what it holds, what it
leaves out and why, whose tiers it has and until when, and what came of the last
copy. It reads the data folder and needs no running server.`

func statusCommand(dir *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "say what is copied, and what is left out",
		Long:  statusHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := openData(*dir)
			if err != nil {
				return cli.Cannot(err, "say what is copied")
			}
			r, err := d.repo(cmd.Context(), slog.New(slog.DiscardHandler)) // problems are in the catalog
			if err != nil {
				return cli.Cannot(err, "say what is copied")
			}
			if err := r.Load(cmd.Context(), time.Now()); err != nil {
				return cli.Cannot(err, "say what is copied")
			}
			return printStatus(cmd.OutOrStdout(), d, r.Catalog(), asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	return c
}

func printStatus(w io.Writer, d *data, c *repo.Catalog, asJSON bool) error {
	last := d.readLastSync()
	problems := append([]string{}, c.Problems...)
	if asJSON {
		return cli.WriteJSON(w, 1, struct {
			Publisher   string             `json:"publisher"`
			Settings    shown              `json:"settings"`
			Livepatches int                `json:"livepatches"`
			Recalls     int64              `json:"recalls_version"`
			Metadata    int64              `json:"metadata_version"`
			Expires     time.Time          `json:"metadata_expires,omitzero"`
			LeftOut     []adminapi.LeftOut `json:"left_out"`
			Problems    []string           `json:"problems"`
			Tiers       tiersShown         `json:"tiers"`
			Last        lastSync           `json:"last_sync"`
		}{c.Publisher, d.shown(), len(c.Entries), c.Recalls, c.Version, c.Expires, api.LeftOut(c.LeftOut), problems, d.tiers(), last})
	}
	if err := printSettings(w, d.settings, false); err != nil {
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "operator:     %s\npublisher:    %s\n", d.tiers(), c.Publisher)
	if c.Version == 0 {
		b.WriteString("holds:        nothing yet\n")
	} else {
		fmt.Fprintf(&b, "holds:        %d livepatches, recalls %d, metadata %d until %s\n", len(c.Entries), c.Recalls, c.Version, c.Expires.UTC().Format(time.RFC3339))
	}
	switch {
	case last.At.IsZero():
		b.WriteString("last copy:    never\n")
	case last.Text == "":
		fmt.Fprintf(&b, "last copy:    %s, good\n", last.At.Format(time.RFC3339))
	default:
		fmt.Fprintf(&b, "last copy:    %s: %s\n", last.At.Format(time.RFC3339), cli.Clean(last.Text))
		if last.Hint != "" {
			fmt.Fprintf(&b, "hint: %s\n", cli.Clean(last.Hint))
		}
	}
	for _, p := range problems {
		fmt.Fprintf(&b, "problem: %s\n", cli.Clean(p))
	}
	printLeftOut(&b, c.LeftOut)
	_, err := io.WriteString(w, b.String())
	return err
}
