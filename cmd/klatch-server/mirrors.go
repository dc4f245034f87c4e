// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/upstream"
	"klatch/internal/wire"
)

// upstreamFile is the credential of this server at the one above.
const upstreamFile = "upstream.json"

const joinHelp = `join makes this server a mirror of another klatch-server: it exchanges a token
for a certificate of its own, which serve renews, and copies from there from
now on. Whoever runs the server above makes the token:

  klatch-server token create --mirror

The token names that server's authority, so it is said to nobody else. It is
read from --token-file or KLATCH_TOKEN, never from the command line.`

func joinCommand(dir *string) *cobra.Command {
	var tokenFile, name string
	var asJSON bool
	c := &cobra.Command{
		Use:     "join URL",
		Short:   "become a mirror of another klatch-server",
		Long:    joinHelp,
		Example: "  klatch-server join https://klatch.example.org:8443 --token-file token",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readSettings(*dir)
			if err != nil {
				return cli.Cannot(err, "join %s", args[0])
			}
			token, err := mirrorToken(tokenFile)
			if err != nil {
				return cli.Cannot(err, "join %s", args[0])
			}
			if name == "" {
				name = s.Names[0]
			}
			d := data{dir: *dir}
			u, err := upstream.Join(cmd.Context(), d.path(upstreamFile), args[0], token, name)
			if err != nil {
				return cli.Cannot(err, "join %s", args[0])
			}
			s.Upstream = u.Server()
			if err := writeSettings(*dir, s); err != nil {
				return cli.Cannot(err, "join %s", args[0])
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, struct {
					MirrorID string    `json:"mirror_id"`
					Server   string    `json:"server"`
					Expires  time.Time `json:"certificate_expires"`
				}{u.MirrorID(), u.Server(), u.Expires()})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "this server is %s of %s, certificate until %s\ncopy now: klatch-server sync\n", u.MirrorID(), u.Server(), u.Expires().UTC().Format(time.RFC3339))
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&tokenFile, "token-file", "", "file with the token; default: KLATCH_TOKEN")
	f.StringVar(&name, "name", "", "what the server above shows; default: this server's first name")
	f.BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

func mirrorToken(file string) (wire.Token, error) {
	text := os.Getenv("KLATCH_TOKEN")
	if file != "" {
		b, err := durable.ReadFile(file, 4096)
		if err != nil {
			return "", err
		}
		text = string(b)
	}
	if text = strings.TrimSpace(text); text == "" {
		return "", fault.New(fault.Invalid, "no_token", "no token was given").
			WithHint("get one from whoever runs the server above, and put it into a file: --token-file FILE")
	}
	return wire.Token(text), nil
}

func mirrorsCommand(dir *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "mirrors",
		Short: "list the servers that copy from this one",
		Long: `mirrors lists the servers that joined this one, and when they last looked. It
reads the data folder and needs no running server.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			db, err := openDatabase(cmd, *dir)
			if err != nil {
				return cli.Cannot(err, "list mirrors")
			}
			defer db.Close() //nolint:errcheck // nothing was written
			list, err := db.Mirrors(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "list mirrors")
			}
			type mirror struct {
				ID       string    `json:"mirror_id"`
				Name     string    `json:"name"`
				Joined   time.Time `json:"joined"`
				LastSeen time.Time `json:"last_seen"`
				Removed  time.Time `json:"removed,omitzero"`
			}
			out := []mirror{}
			for _, m := range list {
				out = append(out, mirror{m.ID, m.Name, m.Joined, m.LastSeen, m.Removed})
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"mirrors": out})
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "MIRROR\tNAME\tJOINED\tLAST SEEN\tREMOVED") //nolint:errcheck // Flush tells
			for _, m := range out {
				removed := "no"
				if !m.Removed.IsZero() {
					removed = m.Removed.Format(time.RFC3339)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", m.ID, cli.Clean(m.Name), m.Joined.Format(time.RFC3339), m.LastSeen.Format(time.RFC3339), removed) //nolint:errcheck // Flush tells
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the list for programs")
	c.AddCommand(&cobra.Command{
		Use:   "remove MIRROR",
		Short: "let a mirror read no more",
		Long: `remove shuts a mirror out at once: its certificate is refused from the next
request on. What it has copied it keeps; all of that is signed and public
knowledge of whoever had it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			db, err := openDatabase(cmd, *dir)
			if err != nil {
				return cli.Cannot(err, "remove mirror %s", args[0])
			}
			defer db.Close() //nolint:errcheck // the removal is committed
			if err := db.RemoveMirror(cmd.Context(), args[0], time.Now()); err != nil {
				return cli.Cannot(err, "remove mirror %s", args[0])
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "mirror %s removed\n", args[0])
			return err
		},
	})
	return c
}

func openDatabase(cmd *cobra.Command, dir string) (*sqlstore.DB, error) {
	if _, err := readSettings(dir); err != nil {
		return nil, err
	}
	d := data{dir: dir}
	return sqlstore.Open(cmd.Context(), d.path(databaseFile))
}
