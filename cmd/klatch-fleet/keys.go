// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/server/adminapi"
	"klatch/internal/tufrepo"
)

func keysCommand(o *options) *cobra.Command {
	parent := &cobra.Command{Use: "keys", Short: "the keys of the operator's repository", Args: cobra.NoArgs,
		Long: "keys shows who signs what, and changes that by drafts that people sign\n(klatch-fleet draft). The roles of people are root, targets and promotion."}
	parent.AddCommand(keysList(o), keysNew(), keysAdd(o), keysRemove(o), keysRenew(o))
	return parent
}

func keysList(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list", Short: "list the roles, their keys and when they expire", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.client()
			if err != nil {
				return cli.Cannot(err, "list keys")
			}
			r, err := client.Rollout(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "list keys")
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"operator": r.Operator, "profile": r.Profile, "roles": r.Roles})
			}
			w := newTable(cmd.OutOrStdout(), "ROLE", "VERSION", "MUST SIGN", "EXPIRES", "KEYS")
			for _, role := range r.Roles {
				var ids []string
				for _, id := range role.Keys {
					ids = append(ids, fmt.Sprintf("%.16s", id))
				}
				expires := role.Expires.UTC().Format(time.RFC3339)
				if role.Due {
					expires += " (due)"
				}
				w.row(role.Name, role.Version, fmt.Sprintf("%d of %d", role.Threshold, len(role.Keys)), expires, strings.Join(ids, " "))
			}
			return w.end()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	return c
}

func keysNew() *cobra.Command {
	var protect bool
	c := &cobra.Command{
		Use: "new FILE.key", Short: "make a key of your own", Args: cobra.ExactArgs(1),
		Long: "new makes a private key (ECDSA P-256) in FILE.key, and its public half beside\nit in FILE.pub, which goes to whoever runs klatch-fleet keys add.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(newKey(cmd, args[0], protect), "make key %s", args[0])
		},
	}
	c.Flags().BoolVar(&protect, "protect", false, "put it under a passphrase")
	return c
}

func newKey(cmd *cobra.Command, path string, protect bool) error {
	base, ok := strings.CutSuffix(path, ".key")
	if !ok {
		return fault.New(fault.Invalid, "bad_name", "%.160q does not end in .key", path)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Conflict, "file_exists", "file %s is there already (%w)", path, orExists(err))
	}
	private, err := keyfile.NewECDSA()
	if err != nil {
		return err
	}
	public, err := keyfile.PublicOf(private)
	if err != nil {
		return err
	}
	half, err := keyfile.EncodePublic(public)
	if err != nil {
		return err
	}
	id, err := tufrepo.KeyID(public)
	if err != nil {
		return err
	}
	if protect {
		passphrase, err := keyfile.Passphrase("new passphrase of " + path)
		if err != nil {
			return err
		}
		if private, err = keyfile.Protect(private, passphrase, public); err != nil {
			return err
		}
	}
	if err := durable.WriteFile(path, private, 0o600); err != nil {
		return err
	}
	if err := durable.WriteFile(base+".pub", half, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "key %s\nprivate %s\npublic  %s.pub\n", id, path, base)
	return err
}

func keysAdd(o *options) *cobra.Command {
	var ch change
	var k adminapi.KeyOrder
	c := &cobra.Command{
		Use: "add ROLE FILE.pub...", Short: "let further keys sign for a role", Args: cobra.MinimumNArgs(2),
		Long: "add lets keys sign for a role, by their public halves. With --remove others go\nout in the same step. The roles of the server are select, snapshot and timestamp.",
		RunE: func(cmd *cobra.Command, args []string) error {
			k.Role, k.Add = args[0], nil
			for _, f := range args[1:] {
				public, err := keyfile.Public(f)
				if err != nil {
					return cli.Cannot(err, "add keys to %s", k.Role)
				}
				b, err := keyfile.EncodePublic(public)
				if err != nil {
					return cli.Cannot(err, "add keys to %s", k.Role)
				}
				k.Add = append(k.Add, string(b))
			}
			return ch.keys(cmd, o, k, "add keys to "+k.Role)
		},
	}
	c.Flags().IntVar(&k.Threshold, "threshold", 0, "how many keys of the role must sign from now on")
	c.Flags().StringSliceVar(&k.Remove, "remove", nil, "whole ids of keys that go out in the same step")
	return ch.flags(c)
}

func keysRemove(o *options) *cobra.Command {
	var ch change
	var k adminapi.KeyOrder
	c := &cobra.Command{
		Use: "remove ROLE KEYID...", Short: "let keys sign for a role no more: lost, stolen, or their holder left", Args: cobra.MinimumNArgs(2),
		Long: "remove takes keys out of a role, by their whole id (klatch-fleet keys list --json).",
		RunE: func(cmd *cobra.Command, args []string) error {
			k.Role, k.Remove = args[0], args[1:]
			return ch.keys(cmd, o, k, "remove keys from "+k.Role)
		},
	}
	c.Flags().IntVar(&k.Threshold, "threshold", 0, "how many keys of the role must sign from now on")
	return ch.flags(c)
}

func keysRenew(o *options) *cobra.Command {
	var ch change
	return ch.flags(&cobra.Command{
		Use: "renew ROLE...", Short: "sign again what expires", Args: cobra.MinimumNArgs(1),
		Long: "renew prepares root, targets or promotion with a whole new life: a year, half a\nyear, thirty days. While promotion is expired only the first tier goes on.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return ch.keys(cmd, o, adminapi.KeyOrder{Renew: args}, "renew "+strings.Join(args, ", "))
		},
	})
}

func (ch *change) keys(cmd *cobra.Command, o *options, k adminapi.KeyOrder, what string) error {
	if k.Reason, k.By = ch.reason, me(); k.Reason == "" {
		k.Reason = what
	}
	return ch.do(cmd, o, what, func(ctx context.Context, c *adminapi.Client) (adminapi.RolloutAnswer, error) {
		return c.OrderKeys(ctx, k)
	})
}
