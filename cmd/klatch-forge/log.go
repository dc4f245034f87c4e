// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/publog"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/trust"
)

func logCommand(o *options) *cobra.Command {
	c := &cobra.Command{
		Use:   "log",
		Short: "The transparency log: what was released, for all to see",
		Long: `The log lists every file that this publisher ever released. It is static files
below repository/log; machines whose trust anchor asks for it load nothing that
is not in it (docs/explanation/transparency-log.md).`,
	}
	c.AddCommand(logInit(o), logShow(o), logVerify(o), logAudit(o), witnessCommand())
	return c
}

func logInit(o *options) *cobra.Command {
	var w publog.Witnesses
	c := &cobra.Command{
		Use:   "init",
		Short: "Make the log key and put the log policy into the trust anchor",
		Long: `Makes the log key, keys/log.key, and log.policy, which names the log, its
witnesses and their quorum; then puts the policy into trust.json. After an edit
of log.policy it only does the last. From then on "publish" logs before it
publishes, and machines with the new anchor refuse what is not logged.

Profile lab asks for no witness, small for one, full for two.`,
		Example: `  klatch-forge log init
  klatch-forge log init --need 1 --witness "w1.example.org+1c2d3e4f+BA... https://w1.example.org" \
      --witness "w2.example.net+5a6b7c8d+BB... https://w2.example.net"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "make the log")
			}
			policy, err := publog.Init(d, w)
			if err != nil {
				return cli.Cannot(err, "make the log of %s", d.Policy.Publisher)
			}
			out(cmd, "log       %s\n", policy.Log(publog.Origin(d)))
			out(cmd, "policy    %s: %d witnesses, %d must cosign\n", publog.PolicyFile(d), len(policy.Witnesses), policy.Least())
			out(cmd, "anchor    %s: install it again on machines and servers\n", d.Anchor())
			return nil
		},
	}
	c.Flags().StringArrayVar(&w.Keys, "witness", nil, "verifier key and address of a witness; may be repeated")
	c.Flags().IntVar(&w.Need, "need", 0, "how many witnesses must cosign (default: what the profile asks for)")
	return c
}

func logShow(o *options) *cobra.Command {
	var entries, asJSON bool
	c := &cobra.Command{
		Use:   "show",
		Short: "Print the log's key, size and newest entries",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "show the log")
			}
			l, err := publog.Open(d)
			if err == nil && l == nil {
				err = noLog()
			}
			if err != nil {
				return cli.Cannot(err, "show the log of %s", d.Policy.Publisher)
			}
			whole, err := l.Read(cmd.Context())
			if err != nil {
				return cli.Cannot(err, "read the log %s", l.Dir)
			}
			cosigned, err := durable.ReadFile(l.Dir+"/"+translog.CosignedFile, translog.MaxCheckpoint)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return cli.Cannot(err, "read the log %s", l.Dir)
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, struct {
					Key       string           `json:"key"`
					Folder    string           `json:"folder"`
					Size      int64            `json:"size"`
					Root      string           `json:"root"`
					Cosigners []string         `json:"cosigners"`
					Entries   []translog.Entry `json:"entries"`
				}{l.Key().String(), l.Dir, whole.Checkpoint.Size, whole.Checkpoint.Root.String(), l.Policy.Cosigners(cosigned), whole.Entries})
			}
			out(cmd, "log        %s\nfolder     %s\nsize       %d entries, root %s\n", l.Key(), l.Dir, whole.Checkpoint.Size, whole.Checkpoint.Root)
			out(cmd, "cosigned   by %d of %d witnesses (%d needed) %s\n", len(l.Policy.Cosigners(cosigned)), len(l.Policy.Witnesses), l.Policy.Least(), strings.Join(l.Policy.Cosigners(cosigned), ", "))
			first := max(0, len(whole.Entries)-10)
			if entries {
				first = 0
			}
			for i, e := range whole.Entries[first:] {
				out(cmd, "%6d     %s  %s\n", first+i, e.SHA256[:16], e.Target)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&entries, "entries", false, "print all entries, not only the last ten")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

func noLog() error {
	return fault.New(fault.NotFound, "no_log", "this publisher keeps no log").WithHint("begin one: klatch-forge log init")
}

// anchorFlag names a trust anchor; the data folder's own is the default.
func anchorFlag(c *cobra.Command, file *string) {
	c.Flags().StringVar(file, "anchor", "", "trust anchor (default: that of the data folder)")
}

func (o *options) anchor(file string) (*trust.Anchor, error) {
	if file == "" {
		d, err := o.data()
		if err != nil {
			return nil, err
		}
		file = d.Anchor()
	}
	b, err := durable.ReadFile(file, trust.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "no_file", "%w", err)
	}
	if err != nil {
		return nil, err
	}
	return trust.ParseAnchor(b, true)
}

func logVerify(o *options) *cobra.Command {
	var anchorFile, proofFile string
	c := &cobra.Command{
		Use:   "verify BUNDLE",
		Short: "Check a bundle's log proof without a network",
		Long: `Checks, with the trust anchor alone, that a bundle is signed by the publisher,
that the proof beside it shows it in the log, and that the witnesses' quorum has
cosigned that log. Nothing is fetched.`,
		Example: "  klatch-forge log verify --anchor trust.json klatch_3.lpb",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if proofFile == "" {
				proofFile = translog.ProofPath(args[0])
			}
			c, target, err := o.verifyLogged(anchorFile, args[0], proofFile)
			if err != nil {
				return cli.Cannot(err, "verify %s (%s)", args[0], fault.CodeOf(err))
			}
			out(cmd, "logged    %s\nlog       %s, %d entries\n", target, c.Origin, c.Size)
			return nil
		},
	}
	anchorFlag(c, &anchorFile)
	c.Flags().StringVar(&proofFile, "proof", "", "proof (default: beside the bundle, ending in .tlog-proof)")
	return c
}

func (o *options) verifyLogged(anchorFile, bundleFile, proofFile string) (translog.Checkpoint, string, error) {
	var none translog.Checkpoint
	anchor, err := o.anchor(anchorFile)
	if err != nil {
		return none, "", err
	}
	policy, err := translog.Require(anchor.LogPolicy, string(anchor.Profile))
	if err == nil && policy == nil {
		err = noLog()
	}
	if err != nil {
		return none, "", err
	}
	content, err := durable.ReadFile(bundleFile, livepatch.MaxBundle)
	if err != nil {
		return none, "", err
	}
	b, err := livepatch.ParseBundle(content)
	if err != nil {
		return none, "", err
	}
	m, err := anchor.OpenManifest(b.Manifest)
	if err != nil {
		return none, "", err
	}
	proof, err := durable.ReadFile(proofFile, translog.MaxProof)
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.New(fault.Untrusted, translog.CodeNoProof, "log proof: %w", err)
	}
	if err != nil {
		return none, "", err
	}
	c, err := policy.Verify(proof, translog.EntryOf(m.TargetPath(), content))
	return c, m.TargetPath(), err
}

func logAudit(o *options) *cobra.Command {
	var q publog.Question
	var anchorFile, kept string
	var asJSON bool
	c := &cobra.Command{
		Use:   "audit [--from DIR|URL]",
		Short: "Compare a whole repository with its whole log",
		Long: `Reads repository and log whole and says whether each file is logged, each
livepatch in the log is offered, each bundle's proof holds, and the log's files follow from its
entries. It needs no key: anybody with the trust anchor can run it.

--kept names a file for the checkpoint: the log must continue the one in it, and
the new one takes its place. Whoever runs this by a timer watches the log.
Exits with 3 when it found something.`,
		Example: "  klatch-forge log audit --anchor trust.json --from https://publisher.example.org/klatch --kept seen.checkpoint",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := o.audit(cmd, q, anchorFile, kept)
			if err != nil {
				return cli.Cannot(err, "audit the log")
			}
			if asJSON {
				err = cli.WriteJSON(cmd.OutOrStdout(), 1, r)
			} else {
				printAudit(cmd, r)
			}
			if err == nil && len(r.Findings) > 0 {
				err = cli.Cannot(fault.New(fault.Untrusted, r.Findings[0].Code, "%d findings; the first is %s %s: %s", len(r.Findings), r.Findings[0].Code, r.Findings[0].Target, r.Findings[0].Text).
					WithHint("docs/howto/audit-the-log.md says what each one means"), "accept the log")
			}
			return err
		},
	}
	anchorFlag(c, &anchorFile)
	c.Flags().StringVar(&q.From, "from", "", "folder or address of the repository (default: that of the data folder)")
	c.Flags().StringVar(&kept, "kept", "", "file that holds the checkpoint of the last audit")
	c.Flags().StringArrayVar(&q.Withdrawn, "withdrawn", nil, "a logged target that the publisher no longer offers; may be repeated")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

func (o *options) audit(cmd *cobra.Command, q publog.Question, anchorFile, kept string) (publog.Report, error) {
	var none publog.Report
	var err error
	if q.Anchor, err = o.anchor(anchorFile); err != nil {
		return none, err
	}
	if q.From == "" {
		d, err := o.data()
		if err != nil {
			return none, err
		}
		q.From = d.Repository()
	}
	q.Now = time.Now()
	q.Client = &http.Client{}
	if kept != "" {
		if q.Kept, err = durable.ReadFile(kept, translog.MaxCheckpoint); err != nil && !errors.Is(err, os.ErrNotExist) {
			return none, err
		}
	}
	r, err := publog.Audit(cmd.Context(), q)
	if err != nil || kept == "" || len(r.Findings) > 0 || len(r.Logs) == 0 {
		return r, err
	}
	return r, durable.WriteFile(kept, r.Logs[len(r.Logs)-1].Checkpoint, 0o644)
}

func printAudit(cmd *cobra.Command, r publog.Report) {
	for _, l := range r.Logs {
		out(cmd, "log       %s: %d entries, root %s\n", l.Origin, l.Size, l.Root)
		if l.KeptSize > 0 {
			out(cmd, "          continues the kept checkpoint of %d entries\n", l.KeptSize)
		}
		if len(l.Cosigners) > 0 {
			out(cmd, "          newest checkpoint cosigned by %s\n", strings.Join(l.Cosigners, ", "))
		}
	}
	out(cmd, "targets   %d, of livepatches with a proof that holds %d\n", r.Targets, r.Proofs)
	for _, f := range r.Findings {
		out(cmd, "FOUND     %s  %s  %s\n", f.Code, f.Target, f.Text)
	}
	if len(r.Findings) == 0 {
		out(cmd, "nothing found: all that is offered is logged, and every livepatch that is logged is offered\n")
	}
}
