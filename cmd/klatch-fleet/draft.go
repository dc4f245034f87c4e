// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"crypto"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/rollout"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/rolloutdraft"
)

const draftHelp = `A draft is a file with what people must sign: a promotion, another list of
tiers, other keys. Each holder of a key signs it, or a copy, on a machine of
their own, without a network; then somebody completes it.`

func draftCommand(o *options) *cobra.Command {
	parent := &cobra.Command{Use: "draft", Short: "sign and complete what people must sign", Long: draftHelp, Args: cobra.NoArgs}
	parent.AddCommand(draftShow(), draftSign(), draftComplete(o))
	return parent
}

func readDraft(path string) (*rolloutdraft.Draft, error) {
	b, err := durable.ReadFile(path, rolloutdraft.Max)
	if err != nil {
		return nil, err
	}
	return rolloutdraft.Parse(b)
}

func draftShow() *cobra.Command {
	return &cobra.Command{
		Use: "show FILE", Short: "say in words what a draft would do, and who must still sign", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := readDraft(args[0])
			if err == nil {
				err = printDraft(cmd, d)
			}
			return cli.Cannot(err, "show %s", args[0])
		},
	}
}

func printDraft(cmd *cobra.Command, d *rolloutdraft.Draft) error {
	words, err := d.Words()
	if err != nil {
		return err
	}
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "draft of operator %s, %s, given as: %q\n", d.Operator, d.Metadata.Prepared.UTC().Format(time.RFC3339), d.Metadata.Reason) //nolint:errcheck // told as far as possible
	for _, line := range words {
		fmt.Fprintf(w, "  %s\n", cli.Clean(line)) //nolint:errcheck // as above
	}
	missing, err := d.Metadata.Missing()
	if err != nil {
		return err
	}
	for _, m := range missing {
		word := "missing      "
		if m.Optional {
			word = "good to have "
		}
		var ids []string
		for _, id := range m.Open {
			ids = append(ids, fmt.Sprintf("%.16s", id))
		}
		fmt.Fprintf(w, "%s %s by %s: %d of %d signatures; open: %s\n", word, m.Role, m.By, m.Have, m.Need, strings.Join(ids, " ")) //nolint:errcheck // as above
	}
	return nil
}

func draftSign() *cobra.Command {
	var keys []string
	var anchor string
	var yes bool
	c := &cobra.Command{
		Use: "sign FILE --key FILE.key --anchor FILE", Short: "add your signature, on your own machine", Args: cobra.ExactArgs(1),
		Long: `sign says in words what would be signed, computed from the metadata itself, asks,
and adds the signature to FILE. The anchor is your own copy of rollout.json: a
draft that does not follow from it is refused, because whoever made it could
have made up what is "in force". Compare the digests with the other holders.
The key may be a file, under a passphrase or not, or a file with a PKCS#11 URI.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(signDraft(cmd, args[0], anchor, keys, yes), "sign %s", args[0])
		},
	}
	c.Flags().StringSliceVar(&keys, "key", nil, "your private key (needed)")
	c.Flags().StringVar(&anchor, "anchor", "", "your copy of the operator's anchor, rollout.json (needed)")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	for _, name := range []string{"key", "anchor"} {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is some lines above
		}
	}
	return c
}

func signDraft(cmd *cobra.Command, path, anchor string, keys []string, yes bool) error {
	d, err := readDraft(path)
	if err != nil {
		return err
	}
	b, err := durable.ReadFile(anchor, rollout.MaxAnchor)
	if err != nil {
		return err
	}
	a, err := rollout.ParseAnchor(b, true) // the holder decides; what a lab key is worth machines ask
	if err != nil {
		return err
	}
	var signers []crypto.Signer
	for _, k := range keys {
		s, err := keyfile.Open(k)
		if err != nil {
			return err
		}
		signers = append(signers, s)
	}
	if _, err := d.Sign(a); err != nil { // with no key: does it follow from the anchor?
		return err
	}
	if err := printDraft(cmd, d); err != nil {
		return err
	}
	if !yes {
		fmt.Fprint(cmd.OutOrStdout(), "\nSign this? Type yes: ") //nolint:errcheck // the answer matters
		answer, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
		if strings.TrimSpace(answer) != "yes" {
			return fault.New(fault.Denied, "not_signed", "nothing was signed: the answer was not yes (%v)", err)
		}
	}
	signed, err := d.Sign(a, signers...)
	if err != nil {
		return err
	}
	if len(signed) == 0 {
		return fault.New(fault.Conflict, "nothing_signed", "no part asks for a signature by these keys, or they have signed already").
			WithHint("klatch-fleet draft show FILE lists the keys that are asked for")
	}
	if b, err = d.Encode(); err != nil {
		return err
	}
	if err := durable.WriteFile(path, b, 0o600); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "signed: %s\nnext: let the others sign, then klatch-fleet draft complete %s\n", strings.Join(signed, ", "), path)
	return err
}

func draftComplete(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "complete FILE...", Short: "bring a draft into force that enough people signed", Args: cobra.MinimumNArgs(1),
		Long: `complete takes the signatures of all copies of one draft together and gives them
to the server, which lets the machines' own client judge the result in a copy,
and publishes it. After a failure the same command completes the work.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(completeDraft(cmd, o, args, asJSON), "complete %s", args[0])
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the outcome for programs")
	return c
}

func completeDraft(cmd *cobra.Command, o *options, paths []string, asJSON bool) error {
	var all *rolloutdraft.Draft
	for _, p := range paths {
		d, err := readDraft(p)
		if err != nil {
			return err
		}
		if all == nil {
			all = d
		} else if err := all.Merge(d); err != nil {
			return err
		}
	}
	b, err := all.Encode()
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if _, err := client.Complete(cmd.Context(), adminapi.Completion{Draft: b, By: me()}); err != nil {
		return err
	}
	if asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), adminapi.Version, map[string]any{"in_force": true})
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), "in force")
	return err
}
