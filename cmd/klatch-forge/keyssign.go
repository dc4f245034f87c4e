// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"crypto"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/forge/ceremony"
	"klatch/internal/keyfile"
	"klatch/internal/tufrepo"
)

func keysShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show FILE",
		Short: "Say in words what a draft would do, and who must still sign",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			draft, err := ceremony.Read(args[0])
			if err == nil {
				err = printWords(cmd, draft)
			}
			if err == nil {
				_, err = printMissing(cmd, draft)
			}
			return cli.Cannot(err, "show %s", args[0])
		},
	}
}

func keysSign() *cobra.Command {
	var files []string
	var yes bool
	c := &cobra.Command{
		Use:   "sign FILE --key FILE.key",
		Short: "Add your signature to a draft, on your own machine",
		Long: `Says in words what would be signed, computed from the metadata itself, asks, and
adds the signature to FILE, which then goes back to the publisher. Compare the
digests with the other holders before you say yes. The key may be a file, under
a passphrase or not, or a file with a PKCS#11 URI.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(signDraft(cmd, args[0], files, yes), "sign %s", args[0])
		},
	}
	c.Flags().StringSliceVar(&files, "key", nil, "your private key (needed)")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	_ = c.MarkFlagRequired("key")
	return c
}

func signDraft(cmd *cobra.Command, path string, files []string, yes bool) error {
	draft, err := ceremony.Read(path)
	if err != nil {
		return err
	}
	if err := printWords(cmd, draft); err != nil {
		return err
	}
	var signers []crypto.Signer
	for _, f := range files {
		s, err := keyfile.Open(f)
		if err != nil {
			return err
		}
		signers = append(signers, s)
	}
	if !yes {
		out(cmd, "\nSign this? Type yes: ")
		answer, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
		if strings.TrimSpace(answer) != "yes" {
			return fault.New(fault.Denied, "not_signed", "nothing was signed: the answer was not yes (%w)", errOr(err))
		}
	}
	signed, err := draft.Sign(signers...)
	if err != nil {
		return err
	}
	if len(signed) == 0 {
		return fault.New(fault.Conflict, "nothing_signed", "no part asks for a signature by these keys, or they have signed already").
			WithHint("klatch-forge keys show FILE lists the keys that are asked for")
	}
	if err := ceremony.Write(path, draft); err != nil {
		return err
	}
	out(cmd, "signed        %s\n", strings.Join(signed, ", "))
	_, err = printMissing(cmd, draft)
	return err
}

func errOr(err error) error {
	if err == nil {
		return os.ErrInvalid
	}
	return err
}

func keysComplete(o *options) *cobra.Command {
	var dryRun bool
	c := &cobra.Command{
		Use:   "complete FILE...",
		Short: "Bring a draft that enough people signed into force",
		Long: `Takes the signatures of all copies of one draft together, adds those of this
host's keys, lets the real client judge the result in a copy, and writes it
into the repository. If it dies in the middle, the same command completes it.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(complete(cmd, o, args, dryRun), "complete %s", args[0])
		},
	}
	c.Flags().BoolVar(&dryRun, "dry-run", false, "write nothing; only let the client judge")
	return c
}

func complete(cmd *cobra.Command, o *options, paths []string, dryRun bool) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	var drafts []*tufrepo.Draft
	for _, p := range paths {
		draft, err := ceremony.Read(p)
		if err != nil {
			return err
		}
		drafts = append(drafts, draft)
	}
	if err := drafts[0].Merge(drafts[1:]...); err != nil {
		return err
	}
	keys, err := ceremony.Keys(d)
	if err != nil {
		return err
	}
	for _, r := range []tufrepo.Role{keys.Root, keys.Targets, keys.Release} {
		if _, err := drafts[0].Sign(r.Signers...); err != nil {
			return err
		}
	}
	if err := printWords(cmd, drafts[0]); err != nil {
		return err
	}
	return finish(cmd, d, drafts[0], keys, dryRun, time.Now())
}

func printWords(cmd *cobra.Command, draft *tufrepo.Draft) error {
	words, err := draft.Words()
	if err != nil {
		return err
	}
	out(cmd, "draft of %s, given as: %s\n", draft.Prepared.UTC().Format(time.RFC3339), draft.Reason)
	for _, w := range words {
		out(cmd, "  %s\n", w)
	}
	return nil
}

// printMissing says who must still sign; open is true while somebody must.
func printMissing(cmd *cobra.Command, draft *tufrepo.Draft) (open bool, err error) {
	missing, err := draft.Missing()
	if err != nil {
		return false, err
	}
	for _, m := range missing {
		word := "missing      "
		if m.Optional {
			word = "good to have "
		} else {
			open = true
		}
		var ids []string
		for _, id := range m.Open {
			ids = append(ids, fmt.Sprintf("%.16s", id))
		}
		out(cmd, "%s %s by %s: %d of %d signatures; open: %s\n", word, m.Role, m.By, m.Have, m.Need, strings.Join(ids, " "))
	}
	return open, nil
}
