// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/flood"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/forge/triage"
	"klatch/internal/kernel"
)

// floodFlags are those of import-delta.
type floodFlags struct {
	triageFlags
	cves             string
	paths            []string
	dryRun, test     bool
	parts            bool
	memory           int
	busy             time.Duration
	fanout, parallel int
}

func importDeltaCommand(o *options) *cobra.Command {
	f := &floodFlags{}
	c := &cobra.Command{
		Use:   "import-delta --kernel RELEASE --to VERSION",
		Short: "Take every fix between two uploads, and account for every CVE",
		Long: `Takes all that changed between a kernel's source and a newer upload, finds the
CVEs among it (changelog and feeds), asks the policy which of them deserve a
livepatch, splits the rest of the change into the smallest source patches that
cover them, drops what this kernel build does not have, tries to build what is
left, finds what is refused, and ends with one cumulative livepatch and a ledger
in which every CVE stands once: livepatched, refused (with the code), failed_test,
not_affected, below_policy, unrated or no_data.

A CVE counts as livepatched only if all that changed in its files is in the
livepatch: nobody outside the upstream repository knows which hunk belongs to
which CVE. Source patches go to the end of the queue, where a person reviews them.
With --parts, a file that is refused is tried again in parts: a CVE also counts if
its record names functions of parts that can be livepatched and none of a part that
cannot. The ledger marks those ("by": "words"); a reviewer must confirm each.

--policy everything is a stress test of the builder. Nobody should run a fleet
like that: see docs/explanation/flood.md.

An interrupted run goes on where it stopped. Exit status: 0 a livepatch was
built, or nothing was left to do; 3 the cumulative livepatch was refused, or
failed its test; 75 broken.`,
		Example: `  klatch-forge feed sync --from cna.jsonl.gz
  klatch-forge import-delta --kernel 6.1.0-50-cloud-amd64 --to 6.1.187-1 --test`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, file, err := importDelta(cmd, o, f)
			if err != nil {
				return cli.Cannot(err, "import what changed up to %s", f.to)
			}
			if f.asJSON {
				b, err := json.MarshalIndent(l, "", " ")
				if err != nil {
					return err
				}
				out(cmd, "%s\n", b)
			} else {
				printLedger(cmd, l, file)
			}
			if l.Counts[flood.FailedTest] > 0 || l.Livepatch == nil && l.Counts[flood.Livepatched] > 0 && !f.dryRun {
				return cli.ExitWith(3)
			}
			return nil
		},
	}
	f.add(c)
	_ = c.MarkFlagRequired("to")
	c.Flags().StringVar(&f.cves, "cves", "", "only the CVEs listed in this file, one a line")
	c.Flags().StringSliceVar(&f.paths, "path", nil, "only CVEs with a file below this path; may be repeated")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "leave the queue as it is and build nothing: only the ledger")
	c.Flags().BoolVar(&f.test, "test", false, "try the livepatch in a virtual machine, and say in the ledger what failed")
	c.Flags().DurationVar(&f.busy, "busy", time.Minute, "with --test: how long the busy machine is kept busy")
	c.Flags().IntVar(&f.memory, "memory", 4096, "MiB that the whole run may take; fewer lots are tried at once where it is small")
	c.Flags().IntVar(&f.fanout, "fanout", flood.DefaultFanout, "compiled files that one change may reach")
	c.Flags().BoolVar(&f.parts, "parts", false, "try files that are refused in parts, and believe what the words of a CVE's record name; a reviewer must confirm each")
	c.Flags().IntVar(&f.parallel, "parallel", 0, "lots tried at once; 0 is one for each processor, as far as the memory allows")
	return c
}

// perLot is what trying one lot may take, in MiB: make, two compilers and
// objtool on large files.
const perLot = 1200

func importDelta(cmd *cobra.Command, o *options, f *floodFlags) (flood.Ledger, string, error) {
	var none flood.Ledger
	d, err := o.data()
	if err != nil {
		return none, "", err
	}
	e, err := catalog.Load(d.Path, kernel.Release(f.kernel))
	if err != nil {
		return none, "", err
	}
	if f.memory < perLot {
		return none, "", invalid("--memory %d is too small", f.memory)(fmt.Sprintf("one lot takes up to %d MiB", perLot))
	}
	debug.SetMemoryLimit(int64(f.memory-perLot) << 20)
	if f.parallel == 0 {
		f.parallel = max(1, min(runtime.NumCPU(), f.memory/perLot-1))
	}
	rep, err := report(cmd, o, &f.triageFlags)
	if err != nil {
		return none, "", err
	}
	all, err := candidates(rep, f)
	if err != nil {
		return none, "", err
	}
	name := fmt.Sprintf("%s_%s_%s", e.Release, f.to, f.policy)
	if err := os.MkdirAll(filepath.Join(d.Path, "ledger"), 0o755); err != nil {
		return none, "", err
	}
	unlock, err := durable.Lock(filepath.Join(d.Path, "ledger", "."+name+".lock"))
	if err != nil {
		return none, "", err
	}
	defer unlock() //nolint:errcheck // nothing was written
	file := filepath.Join(d.Path, "ledger", name+".json")
	l, patches, err := tryDelta(cmd, o, d, e, f, all)
	if err != nil {
		return none, "", err
	}
	l.To, l.Policy = f.to, f.policy
	if err := writeLedger(file, l); err != nil || f.dryRun {
		return l, file, err
	}
	q := queue.Open(d.Path, e.Series)
	for _, p := range patches {
		p.Origin = strings.TrimSuffix(fmt.Sprintf("%s %s, %s", e.Source, f.to, p.Origin), ", ")
		p.Author = author(cmd.Context(), "")
		if err := q.Add(p); err != nil {
			return l, file, err
		}
	}
	if len(patches) > 0 || l.Counts[flood.Livepatched] > 0 {
		if err := buildDelta(cmd, o, e, f, &l); err != nil {
			return l, file, err
		}
	}
	return l, file, writeLedger(file, l)
}

// candidates turns triage's rows into what the flood takes.
func candidates(rep triage.Report, f *floodFlags) ([]flood.Candidate, error) {
	var only map[cve.ID]bool
	if f.cves != "" {
		b, err := durable.ReadFile(f.cves, 4<<20)
		if err != nil {
			return nil, err
		}
		only = map[cve.ID]bool{}
		for line := range strings.Lines(string(b)) {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			id, err := cve.Parse(line)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", f.cves, err)
			}
			only[id] = true
		}
	}
	var all []flood.Candidate
	for _, r := range rep.Rows {
		c := flood.Candidate{ID: r.CVE, Reason: r.Reason, Words: r.Words}
		for _, x := range r.Files {
			c.Files = append(c.Files, x.Path)
		}
		if only != nil && !only[r.CVE] || len(f.paths) > 0 && !slices.ContainsFunc(c.Files, f.below) {
			continue
		}
		switch r.Treatment {
		case triage.Livepatch:
			c.Wanted = true
		case triage.NotAffected:
			c.Status = flood.NotAffected
		case triage.Unrated:
			c.Status = flood.Unrated
		case triage.NoData:
			c.Status = flood.NoData
		default: // a person said reboot or defer, or the policy that it is not urgent
			c.Status = flood.BelowPolicy
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fault.New(fault.NotFound, "no_cve", "no CVE is left of %d between the uploads", len(rep.Rows)).
			WithHint("look at them: klatch-forge triage --kernel %s --to %s", f.kernel, f.to)
	}
	return all, nil
}

func (f *floodFlags) below(file string) bool {
	return slices.ContainsFunc(f.paths, func(p string) bool { return strings.HasPrefix(file, strings.TrimSuffix(p, "/")+"/") || file == p })
}

// tryDelta reads both sources and tries everything.
func tryDelta(cmd *cobra.Command, o *options, d datadir.Dir, e catalog.Entry, f *floodFlags, all []flood.Candidate) (flood.Ledger, []queue.Patch, error) {
	var none flood.Ledger
	ctx := cmd.Context()
	c := o.console(cmd)
	m, err := o.maker(cmd, string(e.Distro))
	if err != nil {
		return none, nil, err
	}
	newTree, err := m.FullSource(ctx, e.Source, f.to)
	if err != nil {
		return none, nil, err
	}
	patches, err := queue.Open(d.Path, e.Series).List()
	if err != nil {
		return none, nil, err
	}
	tree := kerneltree.At(m.Cache, e)
	done := c.step("compare the sources " + e.SourceV + " and " + f.to)
	delta, err := compareSources(ctx, tree, newTree, m.Cache, patches, all)
	if err != nil {
		return none, nil, err
	}
	built, other := delta.Changed()
	done(fmt.Sprintf("%d files differ that this kernel build has, %d others", len(built), len(other)))
	tools, err := objbuild.FetchTools(ctx, m.Archive, m.Cache, c.progress())
	if err != nil {
		return none, nil, err
	}
	state := filepath.Join(m.Cache, "flood", e.BuildID.String(), version) // another version may refuse less, or more
	if err := os.MkdirAll(state, 0o755); err != nil {
		return none, nil, err
	}
	start := time.Now()
	driver := &objbuild.Driver{Cache: m.Cache, Tools: tools, Fanout: 1 << 30} // the flood has a limit for each lot
	res, err := flood.Run(ctx, driver, delta, all, flood.Options{Kernel: e, Base: patches, Tools: tools.Version(), Fanout: f.fanout, Parts: f.parts,
		Parallel: f.parallel, State: flood.StateIn(state), Tell: func(format string, args ...any) {
			c.say("%6.0f s  "+format, append([]any{time.Since(start).Seconds()}, args...)...)
		}})
	return res.Ledger, res.Patches, err
}

func compareSources(ctx context.Context, tree kerneltree.Tree, newTree, cache string, patches []queue.Patch, all []flood.Candidate) (*flood.Delta, error) {
	u, err := tree.Units()
	if err != nil {
		return nil, err
	}
	var files []string
	for _, x := range u.Units {
		files = append(files, x.Source)
	}
	slices.Sort(files)
	g, err := headers.Load(tree.Source(), filepath.Join(tree.Dir, "includes.json"), slices.Compact(files))
	if err != nil {
		return nil, err
	}
	for f := range g.Includes {
		files = append(files, f)
	}
	for _, c := range all {
		files = append(files, c.Files...)
	}
	slices.Sort(files)
	if err := os.MkdirAll(filepath.Join(cache, "builds"), 0o755); err != nil {
		return nil, err
	}
	patched, err := os.MkdirTemp(filepath.Join(cache, "builds"), "queued-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(patched) //nolint:errcheck // scratch
	if err := errors.Join(os.Chmod(patched, 0o755), sandbox.Own(patched)); err != nil {
		return nil, err
	}
	if err := flood.Queued(ctx, tree.Source(), patched, patches); err != nil {
		return nil, err
	}
	return flood.Compare(ctx, flood.Trees{Old: tree.Source(), Patched: patched, New: newTree}, slices.Compact(files), g.Includers)
}

// buildDelta builds the cumulative livepatch, and tries it where asked.
func buildDelta(cmd *cobra.Command, o *options, e catalog.Entry, f *floodFlags, l *flood.Ledger) error {
	res, err := runBuild(cmd, o, e.Release, &buildLimits{})
	if err != nil {
		return err
	}
	if dropped, err := dropInert(o, e, res, l); err != nil {
		return err
	} else if dropped {
		if res, err = runBuild(cmd, o, e.Release, &buildLimits{}); err != nil {
			return err
		}
	}
	if res.Result != build.Built {
		l.Trouble = "the cumulative livepatch was not built: " + res.Error
		for _, r := range res.Refusals {
			l.Trouble += fmt.Sprintf("%s: %s %s; ", r.Code, r.File, r.Detail)
		}
		return nil
	}
	l.Livepatch = &flood.Livepatch{Sequence: res.Sequence, SHA256: res.Module.SHA256, Bytes: res.Module.Bytes, Functions: len(res.Functions)}
	if !f.test {
		return nil
	}
	t, err := runTest(cmd, o, e.Release, trialFlags{busy: f.busy})
	if err != nil {
		return err
	}
	printTest(cmd, t, false)
	if t.Verdict == lab.Fail {
		l.Fail("the livepatch failed in the virtual machine: see test.json")
	}
	return nil
}

// dropInert takes source patches out of the queue that change no object code
// by themselves, beside others that change the same object files.
func dropInert(o *options, e catalog.Entry, res build.Result, l *flood.Ledger) (bool, error) {
	d, err := o.data()
	if err != nil {
		return false, err
	}
	q := queue.Open(d.Path, e.Series)
	patches, err := q.List()
	if err != nil {
		return false, err
	}
	dropped := false
	for _, r := range res.Refusals {
		if r.Code != "nothing_changed" {
			continue
		}
		for _, p := range patches {
			if strings.Join(p.Files, ", ") != r.File {
				continue
			}
			if err := q.Drop(p.Name); err != nil {
				return dropped, err
			}
			l.NotHere(p.Fixes)
			dropped = true
		}
	}
	return dropped, nil
}

func writeLedger(file string, l flood.Ledger) error {
	b, err := json.MarshalIndent(l, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(file, append(b, '\n'), 0o644)
}

func printLedger(cmd *cobra.Command, l flood.Ledger, file string) {
	out(cmd, "\nledger     %s, %s to %s, policy %s\n", l.Kernel, l.From, l.To, l.Policy)
	for _, s := range flood.Statuses {
		out(cmd, "%6d  %-12s  %s\n", l.Counts[s], s, statusText[s])
	}
	out(cmd, "%6d  in all, each once\n", l.Total)
	if l.Applies > 0 {
		out(cmd, "\n%.1f %% of the %d that policy asks for and this kernel build has are livepatched\n", 100*l.Share, l.Applies)
	}
	if l.ByWords > 0 {
		out(cmd, "%6d  of the livepatched stand by the words of their records: parts of their files were\n        refused and left out (left_out in the file); a reviewer must confirm each\n", l.ByWords)
	}
	for _, code := range sortedCodes(l) {
		out(cmd, "%6d  refused: %s\n", l.Refusals[code], code)
	}
	if l.Livepatch != nil {
		out(cmd, "\nlivepatch  sequence %d, %d functions, %d bytes, sha256 %s\n", l.Livepatch.Sequence, l.Livepatch.Functions, l.Livepatch.Bytes, l.Livepatch.SHA256)
	}
	if l.Trouble != "" {
		out(cmd, "\ntrouble    %s\n", l.Trouble)
	}
	out(cmd, "file       %s\n", file)
}

var statusText = map[flood.Status]string{
	flood.Livepatched: "all that changed in their files is in the livepatch",
	flood.Refused:     "cannot be livepatched like this: update and reboot",
	flood.FailedTest:  "built, and stopped by a test",
	flood.NotAffected: "this kernel build does not have the code",
	flood.BelowPolicy: "not urgent enough by the policy",
	flood.Unrated:     "nobody rates them: a person decides (klatch-forge triage review)",
	flood.NoData:      "nobody says what their fix touches",
}

func sortedCodes(l flood.Ledger) []fault.Code {
	var codes []fault.Code
	for c := range l.Refusals {
		codes = append(codes, c)
	}
	slices.SortFunc(codes, func(a, b fault.Code) int {
		if l.Refusals[a] != l.Refusals[b] {
			return l.Refusals[b] - l.Refusals[a]
		}
		return strings.Compare(string(a), string(b))
	})
	return codes
}
