// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/forge/ceremony"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/sign"
	"klatch/internal/keyfile"
	"klatch/internal/tufrepo"
)

// changeFlags are what every change of keys shares.
type changeFlags struct {
	reason    string
	dryRun    bool
	threshold int
	made      []string // key files of a rehearsal
}

func (f *changeFlags) on(c *cobra.Command, threshold bool) *cobra.Command {
	c.Flags().StringVar(&f.reason, "reason", "", "why, for the record (default: the command)")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "write nothing; make the change in a copy and let the client judge")
	if threshold {
		c.Flags().IntVar(&f.threshold, "threshold", 0, "how many keys of the role must sign from now on")
	}
	return c
}

func keysAdd(o *options) *cobra.Command {
	var f changeFlags
	return f.on(&cobra.Command{
		Use:   "add ROLE FILE.pub...",
		Short: "Let further keys sign for a role",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(change(cmd, o, &f, "add key to "+args[0], func(_ datadir.Dir, c *tufrepo.Change) error {
				var err error
				c.Add[args[0]], err = publicKeys(args[1:])
				if f.threshold > 0 {
					c.Threshold[args[0]] = f.threshold
				}
				return err
			}), "add keys to %s", args[0])
		},
	}, true)
}

func keysRemove(o *options) *cobra.Command {
	var f changeFlags
	return f.on(&cobra.Command{
		Use:   "remove ROLE KEYID...",
		Short: "Let keys sign for a role no more: lost, stolen, or their holder left",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(change(cmd, o, &f, "remove key from "+args[0], func(d datadir.Dir, c *tufrepo.Change) error {
				var err error
				c.Remove[args[0]], err = resolve(d, args[0], args[1:])
				if f.threshold > 0 {
					c.Threshold[args[0]] = f.threshold
				}
				return err
			}), "remove keys from %s", args[0])
		},
	}, true)
}

func keysRotate(o *options) *cobra.Command {
	var f changeFlags
	var add, remove []string
	c := f.on(&cobra.Command{
		Use:   "rotate ROLE... [--add FILE.pub --remove KEYID]",
		Short: "Replace keys of a role in one step",
		Long: `Without --add and --remove, for snapshot and timestamp: makes a new key on this
host and takes all others out. This is also the way back after somebody raised
version numbers with a stolen key: clients forget what the old keys signed.

With --add and --remove, for one role: the keys of people, in one ceremony.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(change(cmd, o, &f, "rotate "+strings.Join(args, " "), func(d datadir.Dir, c *tufrepo.Change) error {
				if len(add)+len(remove) == 0 {
					return rotateHere(d, c, args, &f.made)
				}
				if len(args) != 1 {
					return invalid("--add and --remove are for one role")("name one role")
				}
				var err error
				if c.Add[args[0]], err = publicKeys(add); err != nil {
					return err
				}
				if f.threshold > 0 {
					c.Threshold[args[0]] = f.threshold
				}
				c.Remove[args[0]], err = resolve(d, args[0], remove)
				return err
			}), "rotate keys of %s", strings.Join(args, ", "))
		},
	}, true)
	c.Flags().StringSliceVar(&add, "add", nil, "public keys that come in")
	c.Flags().StringSliceVar(&remove, "remove", nil, "ids of the keys that go out")
	return c
}

// rotateHere replaces all keys of the online roles by new ones of this host.
func rotateHere(d datadir.Dir, c *tufrepo.Change, roles []string, made *[]string) error {
	s, err := tufrepo.Look(d.Repository())
	if err != nil {
		return err
	}
	for _, role := range roles {
		if role != "snapshot" && role != "timestamp" {
			return invalid("keys of %s are with people", role)("say which: --add FILE.pub --remove KEYID")
		}
		path, err := sign.NewKeyFile(d, role)
		if err != nil {
			return err
		}
		*made = append(*made, path)
		pub, err := keyfile.Public(path)
		if err != nil {
			return err
		}
		c.Add[role] = []crypto.PublicKey{pub}
		for _, k := range s.Role(role).Keys {
			c.Remove[role] = append(c.Remove[role], k.ID)
		}
	}
	return nil
}

func keysRenew(o *options) *cobra.Command {
	var f changeFlags
	return f.on(&cobra.Command{
		Use:   "renew ROLE...",
		Short: "Sign a role's metadata again, with a whole life before it",
		Long: `For root, targets and release roles, before they expire ("keys list" says
when). Snapshot and timestamp are renewed by "publish --refresh".`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(change(cmd, o, &f, "renew "+strings.Join(args, " "), func(_ datadir.Dir, c *tufrepo.Change) error {
				c.Renew = args
				return nil
			}), "renew %s", strings.Join(args, ", "))
		},
	}, false)
}

func keysRole(o *options) *cobra.Command {
	var f changeFlags
	var add []string
	var drop bool
	c := f.on(&cobra.Command{
		Use:   "role DISTRO/ARCH [--key FILE.pub...]",
		Short: "Add a release role for a distribution release and architecture, or end one",
		Long: `A release role may list livepatches below DISTRO/ARCH/ and nothing else. With
--key its keys are those of people; without, they are made on this host.
Livepatches of that sort that the top list holds move into the new role.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(change(cmd, o, &f, "role "+args[0], func(d datadir.Dir, c *tufrepo.Change) error {
				distro, arch, ok := strings.Cut(args[0], "/")
				if !ok {
					return invalid("%q is not DISTRO/ARCH", args[0])("for example debian-13/amd64")
				}
				r := tufrepo.ReleaseRole{Distro: distro, Arch: arch, Threshold: datadir.Rules[d.Policy.Profile]["release"].Need}
				if drop {
					c.Drop = []string{r.Name()}
					return nil
				}
				var err error
				if len(add) > 0 {
					r.Keys, err = publicKeys(add)
				} else if r, _, err = sign.ReleaseKeys(d, distro, arch); err == nil && len(r.Keys) == 0 {
					r, err = sign.MakeReleaseKeys(d, distro, arch)
				}
				if f.threshold > 0 {
					r.Threshold = f.threshold
				}
				c.Roles = []tufrepo.ReleaseRole{r}
				return err
			}), "change role %s", args[0])
		},
	}, true)
	c.Flags().StringSliceVar(&add, "key", nil, "public keys of the role")
	c.Flags().BoolVar(&drop, "end", false, "end the role: its livepatches are offered no more")
	return c
}

func publicKeys(files []string) ([]crypto.PublicKey, error) {
	var out []crypto.PublicKey
	for _, f := range files {
		pub, err := keyfile.Public(f)
		if err != nil {
			return nil, err
		}
		out = append(out, pub)
	}
	return out, nil
}

// change prepares a change, signs it with the keys of this host, and brings it
// into force if that is enough; else it writes the draft for the others.
func change(cmd *cobra.Command, o *options, f *changeFlags, reason string, fill func(datadir.Dir, *tufrepo.Change) error) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	c := tufrepo.Change{Reason: reason, Add: map[string][]crypto.PublicKey{}, Remove: map[string][]string{}, Threshold: map[string]int{}}
	if f.reason != "" {
		c.Reason = f.reason
	}
	if err := fill(d, &c); err != nil {
		return err
	}
	keys, err := ceremony.Keys(d)
	if err != nil {
		return err
	}
	if f.dryRun { // what was made for it is in memory now
		for _, path := range f.made {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	now := time.Now()
	draft, err := ceremony.Begin(cmd.Context(), d, c, keys, now)
	if err != nil {
		return err
	}
	if err := printWords(cmd, draft); err != nil {
		return err
	}
	return finish(cmd, d, draft, keys, f.dryRun, now)
}

// finish completes a draft, rehearses it, or writes it for the others.
func finish(cmd *cobra.Command, d datadir.Dir, draft *tufrepo.Draft, keys tufrepo.Keys, dryRun bool, now time.Time) error {
	open, err := printMissing(cmd, draft)
	if err != nil {
		return err
	}
	switch {
	case open && dryRun:
		out(cmd, "rehearsal     nothing was written; not enough signatures to ask the client\n")
		return nil
	case dryRun:
		verdicts, err := ceremony.Rehearse(cmd.Context(), d, draft, keys, now)
		if err != nil {
			return err
		}
		return printVerdicts(cmd, verdicts)
	case open:
		path, err := ceremony.Save(d, draft)
		if err != nil {
			return err
		}
		out(cmd, "draft         %s\nnext          each holder: klatch-forge keys sign %s --key FILE.key\n", path, filepath.Base(path))
		out(cmd, "              then here: klatch-forge --dir %s keys complete FILE...\n", d.Path)
		return nil
	}
	verdicts, err := ceremony.Rehearse(cmd.Context(), d, draft, keys, now)
	if err != nil {
		return err
	}
	if err := printVerdicts(cmd, verdicts); err != nil {
		return err
	}
	res, err := ceremony.Complete(cmd.Context(), d, draft, keys, now)
	if err != nil {
		return err
	}
	out(cmd, "in force      root %d, targets %d, snapshot %d, timestamp %d\n", res.Root, res.Targets, res.Snapshot, res.Timestamp)
	return nil
}

func printVerdicts(cmd *cobra.Command, verdicts []ceremony.Verdict) error {
	bad := false
	for _, v := range verdicts {
		word := "accepts it"
		if v.Error != "" {
			word, bad = "REFUSES it: "+v.Error, true
		}
		out(cmd, "rehearsal     %s %s\n", v.Client, word)
	}
	if bad {
		return fault.New(fault.Untrusted, "rehearsal_refused", "machines would refuse the result; nothing was published").
			WithHint("prepare the change again from what is in force now")
	}
	return nil
}
