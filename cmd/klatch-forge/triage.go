// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/changelog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/feed"
	"klatch/internal/forge/fixes"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/triage"
	"klatch/internal/kernel"
)

// triageFlags are shared by the commands that triage for one kernel.
type triageFlags struct {
	kernel, policy, to string
	feeds              []string
	asJSON             bool
}

func (f *triageFlags) add(c *cobra.Command) {
	kernelFlag(c, &f.kernel)
	c.Flags().StringVar(&f.policy, "policy", "default", "default (triage.toml in the data folder changes it) or everything")
	c.Flags().StringVar(&f.to, "to", "", "only what is fixed up to this version of the source package, by its changelog too")
	c.Flags().StringArrayVar(&f.feeds, "feed", nil, "read this feed instead of those in the data folder; may be repeated")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print as JSON")
}

func triageCommand(o *options) *cobra.Command {
	f := &triageFlags{}
	var all bool
	c := &cobra.Command{
		Use:   "triage --kernel RELEASE",
		Short: "Say for each CVE what is done about it on a kernel, and why",
		Long: `Joins the feeds with what a kernel of the catalog is compiled from, and says
for each CVE: livepatch, below_policy, unrated, not_affected or no_data. The
default policy takes critical and high only: by a vendor's priority where one
is known, else by CVSS from 7.0; known exploited ones always. What nobody rates
waits for a person, whose decisions in cve/YEAR/CVE-ID.yaml go before the policy.

Without --to, upstream's version of the kernel decides which flaws it has.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rep, err := report(cmd, o, f)
			if err != nil {
				return cli.Cannot(err, "triage for kernel %s", f.kernel)
			}
			return printReport(cmd, rep, f.asJSON, func(r triage.Row) bool { return all || r.Treatment != triage.NotAffected })
		},
	}
	f.add(c)
	c.Flags().BoolVar(&all, "all", false, "list those that the kernel does not have too")
	c.AddCommand(triageShow(o), triageReview(o), triageLint(o))
	return c
}

func triageReview(o *options) *cobra.Command {
	f := &triageFlags{}
	c := &cobra.Command{
		Use: "review --kernel RELEASE", Short: "List what waits for a person's decision", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rep, err := report(cmd, o, f)
			if err != nil {
				return cli.Cannot(err, "triage for kernel %s", f.kernel)
			}
			return printReport(cmd, rep, f.asJSON, func(r triage.Row) bool { return r.Review })
		},
	}
	f.add(c)
	return c
}

func triageShow(o *options) *cobra.Command {
	f := &triageFlags{}
	c := &cobra.Command{
		Use: "show CVE --kernel RELEASE", Short: "Explain the decision on one CVE", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := cve.Parse(args[0])
			if err != nil {
				return cli.Cannot(err, "show %s", args[0])
			}
			rep, err := report(cmd, o, f)
			if err != nil {
				return cli.Cannot(err, "show %s", id)
			}
			i := slices.IndexFunc(rep.Rows, func(r triage.Row) bool { return r.CVE == id })
			if i < 0 {
				return cli.Cannot(fault.New(fault.NotFound, "no_cve", "no feed has a kernel record of it, or it is not fixed up to --to").
					WithHint("import a newer feed: klatch-forge feed sync --from PATH"), "show %s", id)
			}
			if f.asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"kernel": rep.Kernel, "policy": rep.Policy, "cve": rep.Rows[i]})
			}
			explain(cmd, rep, rep.Rows[i])
			return nil
		},
	}
	f.add(c)
	return c
}

func triageLint(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "lint", Short: "Check policy and reviewed decisions of the data folder", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "lint the decisions")
			}
			if _, err := triage.Named(d.Path, "default"); err != nil {
				return cli.Cannot(err, "lint the policy")
			}
			all, findings, err := triage.Lint(d.Path, time.Now())
			if err != nil {
				return cli.Cannot(err, "lint the decisions")
			}
			for _, x := range findings {
				out(cmd, "%s: %s\n", x.File, x.Text)
			}
			out(cmd, "%d decisions, %d bad files\n", len(all), len(findings))
			if len(findings) > 0 {
				return cli.ExitWith(fault.ExitStatus(fault.New(fault.Invalid, "bad_review", "bad decisions")))
			}
			return nil
		},
	}
}

// report gathers the facts and decides.
func report(cmd *cobra.Command, o *options, f *triageFlags) (triage.Report, error) {
	none := triage.Report{}
	d, err := o.data()
	if err != nil {
		return none, err
	}
	p, err := triage.Named(d.Path, f.policy)
	if err != nil {
		return none, err
	}
	reviews, err := triage.Load(d.Path, time.Now())
	if err != nil {
		return none, err
	}
	records, err := feeds(d, f.feeds)
	if err != nil {
		return none, err
	}
	e, err := catalog.Load(d.Path, kernel.Release(f.kernel))
	if err != nil {
		return none, err
	}
	k, err := o.triageKernel(e)
	if err != nil {
		return none, err
	}
	if f.to == "" {
		return triage.Open(k, p, records, reviews)
	}
	delta, err := o.delta(cmd, e, f.to, records)
	if err != nil {
		return none, err
	}
	return triage.Between(k, p, delta, records, reviews), nil
}

// feeds reads the feeds that are named, or those of the data folder.
func feeds(d datadir.Dir, named []string) (*feed.Set, error) {
	if len(named) == 0 {
		s, err := feed.Load(d.Path)
		if err == nil && s.Len() == 0 {
			err = fault.New(fault.NotFound, "no_feed", "the data folder has no feed").
				WithHint("import one: klatch-forge feed sync --from PATH, or name it: --feed PATH")
		}
		return s, err
	}
	s := feed.NewSet()
	for _, name := range named {
		if err := s.Read(name, ""); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// triageKernel says of a kernel of the catalog what it is compiled from.
func (o *options) triageKernel(e catalog.Entry) (triage.Kernel, error) {
	cache, err := o.cacheDir()
	if err != nil {
		return triage.Kernel{}, err
	}
	t := kerneltree.At(cache, e)
	if !t.Ready() {
		return triage.Kernel{}, fault.New(fault.NotFound, "no_tree", "the cache has no prepared tree of kernel %s", e.Release).
			WithHint("make it: klatch-forge kernel add --release %s", e.Release)
	}
	u, err := t.Units()
	if err != nil {
		return triage.Kernel{}, err
	}
	var sources []string
	for _, x := range u.Units {
		sources = append(sources, x.Source)
	}
	slices.Sort(sources)
	g, err := headers.Load(t.Source(), filepath.Join(t.Dir, "includes.json"), slices.Compact(sources))
	if err != nil {
		return triage.Kernel{}, err
	}
	built := func(path string) triage.Built {
		if len(g.Includers(path)) > 0 {
			return triage.BuiltYes
		}
		if _, err := os.Lstat(filepath.Join(t.Source(), path)); err == nil {
			return triage.BuiltNo
		}
		return triage.BuiltUnknown
	}
	return triage.Kernel{Release: string(e.Release), Series: e.Series, Source: e.SourceV, Built: built}, nil
}

// delta gets the changelog and joins it with the records.
func (o *options) delta(cmd *cobra.Command, e catalog.Entry, to string, records *feed.Set) (fixes.Delta, error) {
	m, err := o.maker(cmd, string(e.Distro))
	if err != nil {
		return fixes.Delta{}, err
	}
	file, _, err := m.Changelog(cmd.Context(), e.Source, to)
	if err != nil {
		return fixes.Delta{}, err
	}
	f, err := os.Open(file)
	if err != nil {
		return fixes.Delta{}, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	uploads, err := changelog.Parse(f, file)
	if err != nil {
		return fixes.Delta{}, err
	}
	return fixes.Between(uploads, records, e.SourceV, to)
}

func printReport(cmd *cobra.Command, rep triage.Report, asJSON bool, listed func(triage.Row) bool) error {
	rows := []triage.Row{}
	for _, r := range rep.Rows {
		if listed(r) {
			rows = append(rows, r)
		}
	}
	if asJSON {
		return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"kernel": rep.Kernel, "source_version": rep.Source, "to": rep.To,
			"policy": rep.Policy, "total": rep.Total, "counts": rep.Counts, "waiting": rep.Waiting, "cves": rows})
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.CVE, r.Treatment, r.Rule, filesOf(r), cli.Clean(r.Title)) //nolint:errcheck // standard output
	}
	if err := w.Flush(); err != nil {
		return err
	}
	var counts []string
	for _, t := range rep.Treatments() {
		counts = append(counts, fmt.Sprintf("%d %s", rep.Counts[t], t))
	}
	out(cmd, "%d CVEs for %s with policy %s: %s; %d wait for a person\n", rep.Total, rep.Kernel, rep.Policy, strings.Join(counts, ", "), rep.Waiting)
	return nil
}

// filesOf counts the files and those that the kernel builds.
func filesOf(r triage.Row) string {
	n := 0
	for _, f := range r.Files {
		if f.Built == triage.BuiltYes {
			n++
		}
	}
	return fmt.Sprintf("%d/%d files built", n, len(r.Files))
}

func explain(cmd *cobra.Command, rep triage.Report, r triage.Row) {
	out(cmd, "%s  %s\n\n", r.CVE, r.Title)
	out(cmd, "kernel     %s, source %s, policy %s\n", rep.Kernel, rep.Source, rep.Policy)
	out(cmd, "treatment  %s\nstatus     %s %s\nrule       %s\nreason     %s\n", r.Treatment, r.Status, r.Justification, r.Rule, r.Reason)
	for i, x := range r.WouldChange {
		out(cmd, "%-10s %s\n", map[bool]string{true: "changed by"}[i == 0], x)
	}
	if len(r.Harm) > 0 {
		out(cmd, "harm       the text speaks of: %s (decides nothing)\n", strings.Join(r.Harm, ", "))
	}
	out(cmd, "\nfacts\n")
	for _, f := range r.Facts {
		out(cmd, "  %-16s %s  [%s, %s, %s]\n", f.Name, f.Value, f.Source.Feed, f.Source.File, f.Source.Date)
	}
}
