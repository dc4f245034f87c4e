// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/server/enroll"
	"klatch/internal/server/store"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/wire"
)

func tokenCommand(dir *string) *cobra.Command {
	parent := &cobra.Command{Use: "token", Short: "enrollment tokens", Args: cobra.NoArgs}
	var o enroll.Order
	var asJSON, mirror bool
	c := &cobra.Command{
		Use:   "create",
		Short: "make an enrollment token",
		Long: `create makes a token with which a machine enrolls, and prints it once. It
writes to the data folder, so it needs no admin token and no running server.

With --mirror the token is for a klatch-server that copies from this one
(klatch-server join); it enrolls no machine.`,
		Example: "  klatch-server token create\n  klatch-server token create --uses 50 --expires 72h --tier canary",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := openData(*dir)
			if err != nil {
				return cli.Cannot(err, "make a token")
			}
			db, err := sqlstore.Open(cmd.Context(), d.path(databaseFile))
			if err != nil {
				return cli.Cannot(err, "make a token")
			}
			defer db.Close() //nolint:errcheck // the token is committed
			if mirror {
				o.Role = store.ForMirror
			}
			e := enroll.Enroller{CA: d.ca, Tokens: db, Now: time.Now}
			secret, t, err := e.NewToken(cmd.Context(), o)
			if err != nil {
				return cli.Cannot(err, "make a token")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, struct {
					Token   wire.Token `json:"token"`
					Role    store.Role `json:"role"`
					Tier    string     `json:"tier"`
					Uses    int        `json:"uses"`
					Expires time.Time  `json:"expires"`
				}{secret, t.Role, t.Tier, t.Uses, t.Expires})
			}
			if mirror {
				fmt.Fprintf(cmd.ErrOrStderr(), "for %d mirror(s), until %s:\n", t.Uses, t.Expires.Format(time.RFC3339)) //nolint:errcheck // as below
				_, err = fmt.Fprintln(cmd.OutOrStdout(), secret)
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "for %d machine(s) of tier %s, until %s:\n", t.Uses, t.Tier, t.Expires.Format(time.RFC3339)) //nolint:errcheck // the token matters
			_, err = fmt.Fprintln(cmd.OutOrStdout(), secret)
			return err
		},
	}
	c.Flags().IntVar(&o.Uses, "uses", 1, "how many machines may use it")
	c.Flags().DurationVar(&o.Expires, "expires", enroll.DefaultExpiry, "how long it can be used")
	c.Flags().StringVar(&o.Tier, "tier", enroll.DefaultTier, "tier of the machines")
	c.Flags().BoolVar(&mirror, "mirror", false, "for a server below this one, not for a machine")
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	parent.AddCommand(c)
	return parent
}

func migrateCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "migrate",
		Short: "bring the database up to date",
		Long: `migrate changes the database's tables to what this program needs. serve does
the same when it starts; run it by hand to see whether it works before.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := openData(*dir)
			if err != nil {
				return cli.Cannot(err, "migrate")
			}
			db, err := sqlstore.Open(cmd.Context(), d.path(databaseFile))
			if err != nil {
				return cli.Cannot(err, "migrate")
			}
			defer db.Close() //nolint:errcheck // nothing is pending
			v, err := db.Version(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "migrate")
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "database is at version %d\n", v)
			return err
		},
	}
}
