// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/obs"
	"klatch/internal/rollout"
	"klatch/internal/server/repo"
	"klatch/internal/server/rolloutrepo"
	"klatch/internal/tufrepo"
)

func rolloutCommand(dir *string) *cobra.Command {
	parent := &cobra.Command{Use: "rollout", Short: "the operator's own repository: tiers and promotions", Args: cobra.NoArgs}
	parent.AddCommand(rolloutInit(dir), rolloutStatus(dir), rolloutAnchor(dir))
	return parent
}

const rolloutInitHelp = `init makes the operator's own repository: the keys, the first list of tiers,
and the anchor that machines are given. A machine with this anchor loads a
livepatch only if the publisher released it and this repository wants it in
the machine's tier; a tier after the first is opened by a promotion.

Profile lab keeps all keys on the server: whoever owns it can promote. In small
and full the keys of people are written to --offline-keys, a folder that is not
the server's: hand them out, two of them sign together, and erase them here.

--tier is a name and the hours that a livepatch must have been in the tier
before; give it once for each tier, in order.`

func rolloutInit(dir *string) *cobra.Command {
	var operator, profile, offline, out string
	var tiers []string
	c := &cobra.Command{
		Use:     "init --operator NAME --profile lab|small|full",
		Short:   "make the operator's repository",
		Long:    rolloutInitHelp,
		Example: "  klatch-server rollout init --operator ops.example.org --profile small --offline-keys /media/stick --tier canary --tier stable:24",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s := rolloutrepo.Setup{Operator: operator, Profile: rollout.Profile(profile), Offline: offline}
			var err error
			if s.Tiers, err = parseTiers(tiers); err != nil {
				return cli.Cannot(err, "make the operator's repository")
			}
			d, err := openData(*dir)
			if err == nil && d.Rollout == rolloutUpstream {
				err = fault.New(fault.Conflict, "rollout_upstream", "this server follows the tiers of the server above").
					WithHint("change tiers at %s; to have tiers of its own: klatch-server configure --rollout local", cmp.Or(d.Upstream, "the server that this one copies from"))
			}
			if err != nil {
				return cli.Cannot(err, "make the operator's repository")
			}
			a, err := rolloutrepo.Init(cmd.Context(), *dir, s, time.Now())
			if err != nil {
				return cli.Cannot(err, "make the operator's repository in %s", *dir)
			}
			b, err := a.Encode()
			if err != nil {
				return err
			}
			if out != "" {
				if err := durable.WriteFile(out, b, 0o644); err != nil {
					return cli.Cannot(err, "write the anchor")
				}
			} else {
				out = *dir + "/rollout.json"
			}
			w := cmd.OutOrStdout()
			fmt.Fprintf(w, "operator's repository of %s made, profile %s\nanchor for machines: %s\n", operator, profile, out) //nolint:errcheck // told as far as possible
			if a.Profile != rollout.Lab {
				fmt.Fprintf(w, "keys of people: %s; hand them out, then erase them here\n", offline) //nolint:errcheck // as above
			}
			_, err = fmt.Fprintln(w, "next: restart klatch-server serve, then klatch-fleet tier list")
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&operator, "operator", "", "name of the operator, such as ops.example.org")
	f.StringVar(&profile, "profile", "", "lab, small or full: how the keys are kept")
	f.StringVar(&offline, "offline-keys", "", "folder for the keys of people; not the server's")
	f.StringVar(&out, "anchor-file", "", "write the anchor for machines here too")
	f.StringArrayVar(&tiers, "tier", []string{"canary", "stable:24"}, "a tier as NAME or NAME:HOURS; repeatable, in order")
	for _, name := range []string{"operator", "profile"} {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is some lines above
		}
	}
	return c
}

func parseTiers(words []string) (rollout.Tiers, error) {
	t := rollout.Tiers{Format: rollout.TiersFormat}
	for _, w := range words {
		name, hours, has := strings.Cut(w, ":")
		n := 0
		if has {
			var err error
			if n, err = strconv.Atoi(hours); err != nil {
				return t, fault.New(fault.Invalid, "bad_tier", "tier %.60q is not NAME or NAME:HOURS", w)
			}
		}
		t.Tiers = append(t.Tiers, rollout.Tier{Name: name, SoakHours: n})
	}
	if _, err := t.Encode(); err != nil {
		return t, fault.New(fault.Invalid, "bad_tier", "%w", err).WithHint("the first tier has no hours: --tier canary --tier stable:24")
	}
	return t, nil
}

func rolloutAnchor(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "anchor FILE",
		Short: "write an anchor that begins at the root in force",
		Long: `anchor writes rollout.json with the newest root. Give it to approvers and to new
machines after root was changed: whoever holds keys that went out can then no
longer show them the time before. Machines that are there follow by themselves.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := openOperatorOf(*dir)
			if err != nil {
				return cli.Cannot(err, "write an anchor")
			}
			a, err := r.NewestAnchor()
			if err != nil {
				return cli.Cannot(err, "write an anchor")
			}
			b, err := a.Encode()
			if err == nil {
				err = durable.WriteFile(args[0], b, 0o644)
			}
			return cli.Cannot(err, "write an anchor")
		},
	}
}

func rolloutStatus(dir *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "say who signs the operator's repository, and until when it is good",
		Long: `status reads the repository in the data folder, without a running server. What
the server signs is renewed by serve; what people sign: klatch-fleet keys renew.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := openOperatorOf(*dir)
			if err != nil {
				return cli.Cannot(err, "read the operator's repository")
			}
			s, err := tufrepo.Look(r.Dir())
			if err != nil {
				return cli.Cannot(err, "read the operator's repository")
			}
			type line struct {
				Name      string    `json:"name"`
				Version   int64     `json:"metadata_version"`
				Expires   time.Time `json:"expires"`
				Threshold int       `json:"threshold"`
				Keys      int       `json:"keys"`
			}
			var lines []line
			for _, role := range s.Roles {
				lines = append(lines, line{role.Name, role.Version, role.Expires, role.Threshold, len(role.Keys)})
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"operator": r.Anchor().Operator, "profile": r.Anchor().Profile, "roles": lines})
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ROLE\tVERSION\tSIGNED BY\tEXPIRES") //nolint:errcheck // Flush tells
			for _, l := range lines {
				fmt.Fprintf(w, "%s\t%d\t%d of %d keys\t%s\n", l.Name, l.Version, l.Threshold, l.Keys, l.Expires.UTC().Format(time.RFC3339)) //nolint:errcheck // Flush tells
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	return c
}

// openRollout opens the operator's repository, or the copy of the one that is
// followed. In its own it signs again what is due, and selects what the
// publisher's copy offers. A server without one gets nil.
func openRollout(ctx context.Context, d *data, copied *repo.Repo, log *slog.Logger) (*rolloutrepo.Repo, error) {
	r, err := openOperator(d.dir, d.settings, log)
	if fault.CodeOf(err) == "no_rollout" {
		return nil, nil // most servers have none
	}
	if err != nil {
		return nil, err
	}
	if _, err = r.Update(ctx, releases(copied.Catalog()), time.Now()); err != nil {
		// Machines stay with what they have; they can still enroll and report.
		log.LogAttrs(ctx, slog.LevelError, "operator's repository was not renewed", obs.Err(err))
	}
	return r, nil
}

// offered is what a machine of a tier may have that follows this server alone.
func offered(r *rolloutrepo.Repo, tier string, all []fleet.Published) []fleet.Published {
	if r == nil {
		return all
	}
	return slices.DeleteFunc(all, func(p fleet.Published) bool { return !r.Offered(tier, p.Target) })
}

// releases is what the copy offers; nil where that is not known whole, so that
// nothing is taken back because a file of the copy is damaged.
func releases(c *repo.Catalog) []rollout.Release {
	if c.Version == 0 || len(c.Problems) > 0 {
		return nil
	}
	out := []rollout.Release{}
	for _, e := range c.Entries {
		out = append(out, rollout.Release{Kernel: e.Kernel, Sequence: e.Sequence, Target: e.Target, Bytes: e.Bytes, SHA256: e.SHA256})
	}
	return out
}

// renewInterval is how often the operator's repository is looked at when the
// copy did not change: soaks end, metadata ages.
const renewInterval = time.Minute

// followRollout keeps the operator's repository on what the copy offers.
func followRollout(ctx context.Context, r *rolloutrepo.Repo, copied *repo.Repo, log *slog.Logger) {
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	var seen *repo.Catalog
	var next time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		now, c := time.Now(), copied.Catalog()
		if c == seen && now.Before(next) && r.Above() == "" {
			continue
		}
		changed, err := r.Update(ctx, releases(c), now)
		next = now.Add(renewInterval)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.LogAttrs(ctx, slog.LevelError, "operator's repository was not renewed", obs.Err(err))
			continue
		case changed:
			log.LogAttrs(ctx, slog.LevelInfo, "operator's repository renewed")
		}
		seen = c
	}
}
