// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/ceremony"
	"klatch/internal/forge/datadir"
	"klatch/internal/keyfile"
	"klatch/internal/tufrepo"
)

func keysCommand(o *options) *cobra.Command {
	c := &cobra.Command{
		Use:   "keys",
		Short: "Keys of the repository: who may sign what, until when, and how that changes",
		Long: `The repository's roles and their keys: root, targets, one release role per
distribution release and architecture, snapshot, timestamp.

A change of keys is a ceremony. It is prepared (add, remove, rotate, renew,
role), which writes a draft into pending/ where this host cannot sign it alone.
The draft's file goes to the people who hold keys; each reads what it means and
signs on their own machine (sign). Back here, complete brings it into force.
With --dry-run nothing is written: the change is made in a copy, and the real
client says whether machines would accept it.

docs/howto/keys-and-ceremonies.md tells the whole way, and what to do when a
key is lost.`,
	}
	c.AddCommand(keysList(o), keysMake(), keysProtect(), keysAdd(o), keysRemove(o), keysRotate(o), keysRenew(o), keysRole(o),
		keysShow(), keysSign(), keysComplete(o), keysCertificate(o))
	return c
}

// keyOut is a key in the output of keys list.
type keyOut struct {
	ID   string `json:"id"`
	Type string `json:"type"`
	File string `json:"file,omitempty"`
}

type roleOut struct {
	Name      string     `json:"name"`
	Pattern   string     `json:"pattern,omitempty"`
	Version   int64      `json:"version"`
	Expires   *time.Time `json:"expires,omitempty"`
	Threshold int        `json:"threshold"`
	Keys      []keyOut   `json:"keys"`
	Targets   int        `json:"targets"`
}

func keysList(o *options) *cobra.Command {
	var asJSON, asICS, check bool
	c := &cobra.Command{
		Use:   "list",
		Short: "Roles, keys, and what expires when",
		Long: `Lists each role with its threshold and keys, and the calendar of what expires.
A key whose file is on this host is shown with its name. With --check the exit
status is 4 when something is late or over, for a timer that sends mail.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "list keys")
			}
			s, err := tufrepo.Look(d.Repository())
			if err != nil {
				return cli.Cannot(err, "list keys")
			}
			files, err := ceremony.Files(d, keyID)
			if err != nil {
				return cli.Cannot(err, "list keys")
			}
			pending, err := ceremony.Pending(d)
			if err != nil {
				return cli.Cannot(err, "list keys")
			}
			now := time.Now()
			entries := ceremony.Calendar(s, now)
			roles := rolesOut(s, files)
			switch {
			case asICS:
				_, err = cmd.OutOrStdout().Write(ceremony.ICalendar(d.Policy.Publisher, entries, now))
			case asJSON:
				err = cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"publisher": d.Policy.Publisher, "profile": d.Policy.Profile,
					"roles": roles, "calendar": entries, "pending": pending, "unfinished": s.Unfinished})
			default:
				printKeys(cmd, roles, entries, pending, now)
			}
			if err != nil {
				return err
			}
			if s.Unfinished {
				return cli.Cannot(fault.New(fault.Conflict, "ceremony_unfinished", "a change of keys was broken off in the middle").
					WithHint("klatch-forge keys complete FILE, with the file in pending/"), "list keys")
			}
			late := func(e ceremony.Entry) bool {
				return e.Level == ceremony.Warning || e.Level == ceremony.Urgent || e.Level == ceremony.Expired
			}
			if check && slices.ContainsFunc(entries, late) {
				return cli.ExitWith(4)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	c.Flags().BoolVar(&asICS, "ics", false, "the calendar as iCalendar")
	c.Flags().BoolVar(&check, "check", false, "exit with 4 when something is late")
	return c
}

func rolesOut(s tufrepo.State, files map[string]string) []roleOut {
	var out []roleOut
	for _, r := range s.Roles {
		one := roleOut{Name: r.Name, Pattern: r.Pattern, Version: r.Version, Threshold: r.Threshold, Keys: []keyOut{}, Targets: len(r.Targets)}
		if r.Version > 0 {
			one.Expires = &r.Expires
		}
		for _, k := range r.Keys {
			one.Keys = append(one.Keys, keyOut{k.ID, k.Type, files[k.ID]})
		}
		out = append(out, one)
	}
	return out
}

func printKeys(cmd *cobra.Command, roles []roleOut, entries []ceremony.Entry, pending []string, now time.Time) {
	for _, r := range roles {
		what := fmt.Sprintf("version %d", r.Version)
		if r.Version == 0 {
			what = "not signed yet"
		}
		out(cmd, "%-24s %s, %d of %d keys must sign\n", r.Name, what, r.Threshold, len(r.Keys))
		if r.Pattern != "" {
			out(cmd, "    may list %s, has %d\n", r.Pattern, r.Targets)
		}
		for _, k := range r.Keys {
			where := "not on this host"
			if k.File != "" {
				where = k.File
			}
			out(cmd, "    %.16s  %-8s  %s\n", k.ID, k.Type, where)
		}
	}
	out(cmd, "\nexpires\n")
	for _, e := range entries {
		left := e.Expires.Sub(now).Round(time.Hour)
		out(cmd, "    %s  %-24s in %4.1f days  %s\n", e.Expires.UTC().Format("2006-01-02 15:04"), e.What, left.Hours()/24, e.Level)
		if e.Level != ceremony.Good {
			out(cmd, "        %s\n", e.ToDo)
		}
	}
	for _, p := range pending {
		out(cmd, "\nwaits for signatures: %s\n", p)
	}
}

func keyID(path string) (string, error) {
	pub, err := keyfile.Public(path)
	if err != nil {
		return "", err
	}
	return tufrepo.KeyID(pub)
}

func keysMake() *cobra.Command {
	var bare bool
	c := &cobra.Command{
		Use:   "make FILE.key",
		Short: "Make a key of your own, under a passphrase",
		Long: `Makes an ECDSA P-256 key on this machine: FILE.key, under a passphrase that is
asked for (or read from the file that KLATCH_PASSPHRASE_FILE names), and
FILE.pub, which goes to the publisher for "keys add". The private half never
leaves this machine.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := makeKey(args[0], bare)
			if err != nil {
				return cli.Cannot(err, "make key %s", args[0])
			}
			out(cmd, "key %s\nprivate  %s: keep it\npublic   %s: give it to the publisher\n", id, args[0], publicName(args[0]))
			return nil
		},
	}
	c.Flags().BoolVar(&bare, "no-passphrase", false, "leave the file unprotected")
	return c
}

func publicName(key string) string { return strings.TrimSuffix(key, ".key") + ".pub" }

func makeKey(path string, bare bool) (string, error) {
	if !strings.HasSuffix(path, ".key") {
		return "", invalid("%q does not end in .key", path)("give a name such as anna-root.key")
	}
	if _, err := durable.ReadFile(path, 1<<20); err == nil {
		return "", fault.New(fault.Conflict, "key_exists", "%s is there already", path)
	}
	content, err := keyfile.NewECDSA()
	if err != nil {
		return "", err
	}
	pub, err := keyfile.PublicOf(content)
	if err != nil {
		return "", err
	}
	if !bare {
		if content, err = protect(content, path); err != nil {
			return "", err
		}
	}
	half, err := keyfile.EncodePublic(pub)
	if err != nil {
		return "", err
	}
	if err := durable.WriteFile(path, content, 0o600); err != nil {
		return "", err
	}
	if err := durable.WriteFile(publicName(path), half, 0o644); err != nil {
		return "", err
	}
	return tufrepo.KeyID(pub)
}

// protect asks for a new passphrase, twice where a person types it.
func protect(content []byte, path string) ([]byte, error) {
	first, err := keyfile.Passphrase("new passphrase for " + path)
	if err != nil {
		return nil, err
	}
	second, err := keyfile.Passphrase("the same again")
	if err != nil {
		return nil, err
	}
	if string(first) != string(second) {
		return nil, invalid("the two passphrases differ")("type the same twice")
	}
	pub, err := keyfile.PublicOf(content)
	if err != nil { // a manifest key has another form
		pub = nil
	}
	return keyfile.Protect(content, first, pub)
}

func keysProtect() *cobra.Command {
	return &cobra.Command{
		Use:   "protect FILE.key...",
		Short: "Put key files under a passphrase",
		Long: `Replaces each file by one that is under a passphrase. The keys of snapshot and
timestamp are used each day without a person; leave those as they are.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, path := range args {
				content, err := durable.ReadFile(path, 64<<10)
				if err == nil {
					content, err = protect(content, path)
				}
				if err == nil {
					err = durable.WriteFile(path, content, 0o600)
				}
				if err != nil {
					return cli.Cannot(err, "protect %s", path)
				}
				out(cmd, "protected %s\n", filepath.Base(path))
			}
			return nil
		},
	}
}

// resolve makes whole key ids of what a person typed.
func resolve(d datadir.Dir, role string, prefixes []string) ([]string, error) {
	s, err := tufrepo.Look(d.Repository())
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, p := range prefixes {
		id, err := ceremony.Resolve(s, role, p)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}
