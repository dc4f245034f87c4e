// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/translog"
	"klatch/internal/trust"
)

func (p *places) anchor() string   { return filepath.Join(p.root, "etc/klatch/trust.json") }
func (p *places) operator() string { return filepath.Join(p.root, "etc/klatch/rollout.json") }
func (p *places) labFlag() string  { return filepath.Join(p.root, "etc/klatch/allow-lab-keys") }

func trustCommand(p *places) *cobra.Command {
	c := &cobra.Command{
		Use:   "trust",
		Short: "show and change whom this machine believes",
		Long: `The trust anchor, /etc/klatch/trust.json, is what this machine believes before it
reads anything from a network: the keys of one publisher. Get it from the
publisher by another way than the server, and compare the fingerprints.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use:   "install FILE",
		Short: "believe the publisher of an anchor file",
		Long: `install checks an anchor file and puts it in place of the one before. It takes
effect at the next check. What is loaded stays loaded.`,
		Example: "  klatch trust install lab-trust.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(p.install(cmd.OutOrStdout(), args[0]), "install the trust anchor %s", args[0])
		},
	}, &cobra.Command{
		Use:   "install-rollout FILE",
		Short: "follow the operator of a rollout anchor file",
		Long: `install-rollout checks an operator's anchor file and puts it in place as
/etc/klatch/rollout.json. From the next check on this machine loads only what the
operator's signed repository selects for its tier, and what the publisher released
as well. Name the tier in /etc/klatch/conf.d (tier = "...") first.

To go without an operator again: rm /etc/klatch/rollout.json`,
		Example: "  klatch trust install-rollout rollout.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cli.Cannot(p.installRollout(cmd.OutOrStdout(), args[0]), "install the rollout anchor %s", args[0])
		},
	}, &cobra.Command{
		Use:     "show",
		Short:   "print the publisher, the profile and the key fingerprints",
		Long:    "show prints whom this machine believes, with fingerprints to compare.",
		Example: "  klatch trust show",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cli.Cannot(p.show(cmd.OutOrStdout()), "show the trust anchor")
		},
	}, &cobra.Command{
		Use:   "allow-lab",
		Short: "let this machine believe lab keys",
		Long: `allow-lab lets this machine believe publishers of profile lab. Their keys lie
unprotected on one machine: whoever can read them owns the kernel of every
machine that allows them. For laboratories and demonstrations only.

To take it back: rm /etc/klatch/allow-lab-keys`,
		Example: "  klatch trust allow-lab",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := p.write(p.labFlag(), nil); err != nil {
				return cli.Cannot(err, "allow lab keys")
			}
			_, err := fmt.Fprintln(cmd.ErrOrStderr(), "WARNING: this machine now believes publishers whose keys lie unprotected on one machine.\nNever do this where it matters. To take it back: rm /etc/klatch/allow-lab-keys")
			return err
		},
	})
	return c
}

func (p *places) install(w io.Writer, file string) error {
	b, err := durable.ReadFile(file, trust.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "no_file", "%w", err)
	}
	if err != nil {
		return err
	}
	a, err := trust.ParseAnchor(b, p.labAllowed())
	if err != nil {
		return err
	}
	if _, err := translog.Require(a.LogPolicy, string(a.Profile)); err != nil {
		return err
	}
	if err := p.write(p.anchor(), b); err != nil {
		return err
	}
	return printAnchor(w, a)
}

func (p *places) installRollout(w io.Writer, file string) error {
	b, err := durable.ReadFile(file, rollout.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "no_file", "%w", err)
	}
	if err != nil {
		return err
	}
	a, err := rollout.ParseAnchor(b, p.labAllowed())
	if err != nil {
		return err
	}
	if err := p.write(p.operator(), b); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "Operator:    %s\nProfile:     %s\nFirst root:  SHA256:%x\n", clean(a.Operator), a.Profile, sha256.Sum256(a.Root))
	return err
}

func (p *places) show(w io.Writer) error {
	b, err := durable.ReadFile(p.anchor(), trust.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "no_anchor", "no trust anchor is installed").
			WithHint("install the one of your publisher: klatch trust install FILE")
	}
	if err != nil {
		return err
	}
	a, err := trust.ParseAnchor(b, true)
	if err != nil {
		return err
	}
	if err := printAnchor(w, a); err != nil || a.Profile != trust.Lab || p.labAllowed() {
		return err
	}
	_, err = fmt.Fprintln(w, "lab keys are not allowed on this machine: the anchor has no effect")
	return err
}

func (p *places) labAllowed() bool {
	_, err := os.Lstat(p.labFlag())
	return err == nil
}

// write puts a file that everybody may read into /etc/klatch.
func (p *places) write(path string, content []byte) error {
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = durable.WriteFile(path, content, 0o644)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fault.New(fault.Denied, "root_only", "%w", err).WithHint("repeat it with sudo")
	}
	return err
}

// printAnchor shows what a person compares with the publisher's own words.
func printAnchor(w io.Writer, a *trust.Anchor) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) //nolint:errcheck // Flush tells
	}
	row("Publisher:", "%s", a.Publisher)
	row("Profile:", "%s", a.Profile)
	row("Manifest keys:", "%d of %d must sign", a.Manifest.Threshold, len(a.Manifest.Keys))
	for _, k := range a.Manifest.Keys {
		v, err := note.NewVerifier(k)
		if err != nil {
			return err // ParseAnchor has accepted it
		}
		row("", "%s  SHA256:%x", v.Name(), sha256.Sum256([]byte(k)))
	}
	for i, k := range a.ModuleKeys {
		row(map[bool]string{true: "Module keys:"}[i == 0], "%s  SHA256:%x", clean(k.Name), sha256.Sum256(k.Modulus))
	}
	row("First root:", "SHA256:%x", sha256.Sum256(a.Root))
	policy, err := translog.Require(a.LogPolicy, string(a.Profile))
	if err != nil {
		return err
	}
	if policy == nil {
		row("Log:", "none; livepatches need not be logged")
		return t.Flush()
	}
	row("Log:", "%d of %d witnesses must cosign, at the least", policy.Least(), len(policy.Witnesses))
	for _, l := range policy.Logs {
		row("", "%s  SHA256:%x", clean(l.Name()), sha256.Sum256([]byte(l.String())))
	}
	for _, w := range policy.Witnesses {
		row("", "witness %s  SHA256:%x", clean(w.Key.Name()), sha256.Sum256([]byte(w.Key.String())))
	}
	return t.Flush()
}
