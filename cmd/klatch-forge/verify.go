// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/audit"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

func evidenceVerify() *cobra.Command {
	var anchor, release string
	var sequence uint32
	var asJSON, oldCopy bool
	c := &cobra.Command{
		Use:   "verify REPOSITORY --anchor FILE",
		Short: "Check the evidence of published livepatches, as a stranger",
		Long: `Needs nothing but the published files and the publisher's trust anchor: no data
folder, no key and, where REPOSITORY is a folder, no network. From the anchor on
it verifies the metadata, the evidence policy, each bundle with its manifest and
module signature, and then the statements beside it: who built the module from
what, how it was tested on this kernel build, who reviewed the source patches,
and which CVEs it fixes.

Exit status 0 if all livepatches in question are accepted, 3 if one is refused,
with its code (docs/reference/evidence.md).

Metadata expires after two days. --old-copy checks a folder that somebody kept,
as of the last moment at which it was fresh.`,
		Example: "  klatch-forge evidence verify repository/ --anchor trust.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := audit.Question{From: args[0], Client: &http.Client{}, Now: time.Now(), Kernel: kernel.Release(release), Sequence: livepatch.Sequence(sequence)}
			b, err := durable.ReadFile(anchor, trust.MaxAnchor)
			if err != nil {
				return cli.Cannot(fault.New(fault.NotFound, "no_anchor", "%w", err).WithHint("get it from the publisher, by another way than the repository"), "read the anchor")
			}
			if q.Anchor, err = trust.ParseAnchor(b, true); err != nil {
				return cli.Cannot(err, "read the anchor")
			}
			if oldCopy {
				if q.Now, err = audit.LastMoment(args[0]); err != nil {
					return cli.Cannot(err, "read the copy")
				}
			}
			a, err := audit.Repository(cmd.Context(), q)
			if err != nil {
				if asJSON {
					if err := cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"accepted": false, "code": fault.CodeOf(err), "why": err.Error(), "next": fault.HintOf(err), "answer": a}); err != nil {
						return err
					}
				}
				if fault.CodeOf(err) == "metadata_expired" && !oldCopy {
					err = fault.New(fault.Untrusted, "metadata_expired", "%w", err).WithHint("fetch the repository again; or check the old copy as of its own time: --old-copy")
				}
				return cli.Cannot(err, "verify %s (%s)", args[0], fault.CodeOf(err))
			}
			if asJSON {
				err = cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"accepted": len(a.Refused()) == 0, "as_of": q.Now.UTC(), "answer": a})
				if err != nil {
					return err
				}
			} else {
				printAnswer(cmd, a, q.Now, oldCopy)
			}
			if len(a.Refused()) > 0 {
				return cli.ExitWith(3)
			}
			return nil
		},
	}
	c.Flags().StringVar(&anchor, "anchor", "", "the publisher's trust anchor (needed)")
	c.Flags().StringVar(&release, "kernel", "", "only livepatches for this kernel release")
	c.Flags().Uint32Var(&sequence, "sequence", 0, "only this sequence")
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON (docs/reference/evidence.md)")
	c.Flags().BoolVar(&oldCopy, "old-copy", false, "check a folder as of the last moment at which its metadata was fresh")
	_ = c.MarkFlagRequired("anchor")
	return c
}

func printAnswer(cmd *cobra.Command, a audit.Answer, now time.Time, oldCopy bool) {
	out(cmd, "publisher   %s, profile %s, evidence policy %d\n", a.Publisher, a.Profile, a.Policy)
	if oldCopy {
		out(cmd, "OLD COPY    as of %s: what was published since is not here\n", now.UTC().Format(time.RFC3339))
	}
	if a.Profile == trust.Lab {
		out(cmd, "LAB         one key builds, tests, reviews and publishes: this evidence keeps order, it proves nothing to others\n")
	}
	for _, l := range a.Livepatches {
		if !l.Accepted {
			out(cmd, "\nrefused     %s: %s\n            %s\n", l.Target, l.Code, l.Why)
			if l.Next != "" {
				out(cmd, "next        the publisher: %s\n", l.Next)
			}
			continue
		}
		out(cmd, "\naccepted    %s\n", l.Target)
		printEvidence(cmd, *l.Evidence)
		for _, s := range l.Evidence.Sources {
			author := s.Author
			if author == "" {
				author = "nobody named"
			}
			out(cmd, "source      %s  sha256:%.16s…  by %s\n", s.Name, s.SHA256, author)
		}
		for _, f := range l.Evidence.Fixes {
			out(cmd, "fix         %s (%s)\n", f.CVE, f.Check)
		}
		out(cmd, "scenarios   %d passed\n", len(l.Evidence.Scenarios))
	}
}
