// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/evidence"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/kernel"
)

func reviewCommand(o *options) *cobra.Command {
	var release, from, as, comment string
	var approve, reject bool
	c := &cobra.Command{
		Use:   "review {--kernel RELEASE | --from DIR} [--approve | --reject]",
		Short: "Read the source patches of a build, and sign a decision on exactly these",
		Long: `Without --approve or --reject, prints what is to be reviewed: each source patch
with its author and digest, and what the builder warns of. With one of them,
signs that decision with the reviewer's key in this data folder.

Nobody reviews their own source patch: the signing gate refuses it. --from names
the folder of a build that was copied from another machine; the signed statement
lies in its folder evidence/ and goes back to the publisher, who takes it with
"evidence add".`,
		Example: `  klatch-forge review --kernel 6.1.0-50-cloud-amd64 | less
  klatch-forge review --kernel 6.1.0-50-cloud-amd64 --approve --comment "same as upstream"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "review")
			}
			if from == "" {
				newest, _, err := newestBuild(d, kernel.Release(release))
				if err != nil {
					return cli.Cannot(err, "review")
				}
				from = filepath.Dir(newest.Module.Path)
			}
			b, plan, err := build.Load(from)
			if err != nil {
				return cli.Cannot(err, "review %s", from)
			}
			if !approve && !reject {
				printSources(cmd, b, plan)
				return nil
			}
			k, err := attest.Key(d, evidence.Reviewer, as)
			if err != nil {
				return cli.Cannot(err, "review %s", from)
			}
			decision := evidence.Approved
			if reject {
				decision = evidence.Rejected
			}
			e, err := attest.Review(k, b, plan, decision, comment, time.Now())
			if err != nil {
				return cli.Cannot(err, "review %s", from)
			}
			file, err := attest.Put(from, evidence.Reviewer, k.Name, e)
			if err != nil {
				return cli.Cannot(err, "review %s", from)
			}
			out(cmd, "%-9s by %s: %d source patches of sequence %d for %s\nstatement %s\n", decision, k.Name, len(attest.Sources(plan)), b.Sequence, b.KernelBuild(), file)
			for _, s := range attest.Sources(plan) {
				if k.Signer().Is(s.Author) {
					out(cmd, "NOTE      you are the author of %s: outside of profile lab this review does not count\n", s.Name)
				}
			}
			return nil
		},
	}
	optionalKernelFlag(c, &release)
	c.Flags().StringVar(&from, "from", "", "folder of one build, such as out/RELEASE/1")
	c.Flags().StringVar(&as, "as", "", "name of the reviewer's key, where there are several")
	c.Flags().StringVar(&comment, "comment", "", "goes into the statement, which is published")
	c.Flags().BoolVar(&approve, "approve", false, "sign that these source patches may be published")
	c.Flags().BoolVar(&reject, "reject", false, "sign that they may not")
	c.MarkFlagsOneRequired("kernel", "from")
	c.MarkFlagsMutuallyExclusive("kernel", "from")
	c.MarkFlagsMutuallyExclusive("approve", "reject")
	return c
}

func printSources(cmd *cobra.Command, b build.Result, p compose.Plan) {
	out(cmd, "sequence %d for %s\nmodule   sha256 %s\n", b.Sequence, b.KernelBuild(), b.Module.SHA256)
	for _, f := range b.Functions {
		out(cmd, "replaces %s\n", f)
	}
	for _, w := range attest.Warnings(b) {
		out(cmd, "WARNING  %s\n", w)
	}
	for _, s := range attest.Sources(p) {
		out(cmd, "\n=== %s  author %q  sha256 %s\n", s.Name, s.Author, s.SHA256)
		if hides(p, s.Name) {
			out(cmd, "WARNING  it holds characters that a terminal does not show, or that change the order of others: look at the bytes\n")
		}
		for _, x := range p.Patches {
			if x.Name == s.Name {
				out(cmd, "fixes %s; from %s\n\n%s", joinIDs(x.Fixes), x.Origin, x.Diff)
			}
		}
		if p.Handwritten == nil {
			continue
		}
		for _, f := range p.Handwritten.Files {
			if f.Name == s.Name {
				out(cmd, "\n%s", f.Content)
			}
		}
	}
}

// hides says whether a source has characters that make it look otherwise than
// a compiler reads it: control and format characters, such as those that turn
// the direction of text.
func hides(p compose.Plan, name string) bool {
	var all []byte
	for _, x := range p.Patches {
		if x.Name == name {
			all = append(all, x.Diff...)
		}
	}
	if p.Handwritten != nil {
		for _, f := range p.Handwritten.Files {
			if f.Name == name {
				all = append(all, f.Content...)
			}
		}
	}
	return strings.ContainsFunc(string(all), func(r rune) bool {
		return r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == utf8.RuneError)
	})
}

// authorFlag names who puts a source patch into the queue.
func authorFlag(c *cobra.Command, to *string) {
	c.Flags().StringVar(to, "author", "", "who wrote or adapted it, whom a reviewer must not be (KLATCH_AUTHOR; default: as git has it, else the user)")
}

// author is the one that was said, or the best that this machine knows.
func author(ctx context.Context, said string) string {
	for _, a := range []string{said, os.Getenv("KLATCH_AUTHOR"), gitAuthor(ctx)} {
		if a != "" {
			return a
		}
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return ""
}

// gitAuthor is "Name <address>" of git's settings; empty where there is none.
func gitAuthor(ctx context.Context) string {
	get := func(key string) string {
		b, err := exec.CommandContext(ctx, "git", "config", "--get", key).Output()
		if err != nil {
			return "" // no git, or not set
		}
		return strings.TrimSpace(string(b))
	}
	name, mail := get("user.name"), get("user.email")
	if mail == "" {
		return name
	}
	return strings.TrimSpace(name + " <" + mail + ">")
}
