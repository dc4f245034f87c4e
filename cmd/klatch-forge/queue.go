// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/kernel"
)

func queueCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "queue", Short: "Source patches, or a hand-written livepatch: what is built next"}
	c.AddCommand(queueImport(o), queueAdd(o), queueCheck(o), queueDrop(o), queueList(o), queueLint(o))
	return c
}

func queueImport(o *options) *cobra.Command {
	var release, to, check, who string
	var files, functions, fixes []string
	c := &cobra.Command{
		Use:   "import --kernel RELEASE --to VERSION --file PATH --fixes CVE",
		Short: "Take a fix from a newer source package",
		Long: `Takes the change of the named files between this kernel's source and a newer
version of the same source package, and puts it at the end of the queue as one
source patch. --function takes only the hunks in functions of that name: a
security upload holds many fixes, and a livepatch should hold what it claims.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ids, err := parseFixes(fixes)
			if err == nil {
				err = importFix(cmd, o, release, to, files, functions, ids, check, who)
			}
			return cli.Cannot(err, "import the fix of %s", strings.Join(fixes, ", "))
		},
	}
	kernelFlag(c, &release)
	c.Flags().StringVar(&to, "to", "", "version of the newer source package (needed)")
	c.Flags().StringSliceVar(&files, "file", nil, "file of the kernel's source; may be repeated (needed)")
	c.Flags().StringSliceVar(&functions, "function", nil, "only changes in this function; may be repeated")
	c.Flags().StringSliceVar(&fixes, "fixes", nil, "CVE that the change fixes; may be repeated (needed)")
	c.Flags().StringVar(&check, "check", "", "program that shows the flaw; see: klatch-forge queue check --help")
	authorFlag(c, &who)
	for _, f := range []string{"to", "file", "fixes"} {
		_ = c.MarkFlagRequired(f)
	}
	return c
}

func importFix(cmd *cobra.Command, o *options, release, to string, files, functions []string, ids []cve.ID, check, who string) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	e, err := catalog.Load(d.Path, kernel.Release(release))
	if err != nil {
		return err
	}
	if e.Distro == kerneltree.OwnDistro {
		return invalid("kernel %s is your own: no archive has a newer source of it", release)("make a diff, then: klatch-forge queue add --series " + e.Series + " FILE.patch")
	}
	m, err := o.maker(cmd, string(e.Distro))
	if err != nil {
		return err
	}
	newer, err := m.Files(cmd.Context(), e.Source, to, files)
	if err != nil {
		return err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return err
	}
	diff, err := queue.Change(cmd.Context(), kerneltree.At(cache, e).Source(), newer, files, functions)
	if err != nil {
		return err
	}
	origin := fmt.Sprintf("%s %s to %s: %s", e.Source, e.SourceV, to, strings.Join(files, " "))
	if len(functions) > 0 {
		origin += " (" + strings.Join(functions, " ") + ")"
	}
	return enqueue(cmd, queue.Open(d.Path, e.Series), queue.Patch{Name: string(ids[0]), Fixes: ids, Origin: origin, Author: author(cmd.Context(), who), Diff: diff}, check)
}

// enqueue stores the check first: a fix that is in the queue has its check.
func enqueue(cmd *cobra.Command, q queue.Queue, p queue.Patch, check string) error {
	note, err := setChecks(q, p.Fixes, check)
	if err != nil {
		return err
	}
	if err := q.Add(p); err != nil {
		return err
	}
	out(cmd, "queue %s: added %s (%d bytes of diff), %s\n", q.Series, p.Name, len(p.Diff), note)
	return nil
}

// setChecks stores the check of fixes, if there is one, and says so.
func setChecks(q queue.Queue, ids []cve.ID, check string) (note string, err error) {
	if check == "" {
		return "UNCHECKED: add a program that shows the flaw: klatch-forge queue check", nil
	}
	program, err := durable.ReadFile(check, 64<<20)
	if err != nil {
		return "", err
	}
	for _, id := range ids {
		if err := q.SetCheck(id, program); err != nil {
			return "", err
		}
	}
	return "with a check", nil
}

func parseFixes(fixes []string) ([]cve.ID, error) {
	var ids []cve.ID
	for _, f := range fixes {
		id, err := cve.Parse(f)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func queueAdd(o *options) *cobra.Command {
	var series, name, check, source, who string
	var fixes []string
	c := &cobra.Command{
		Use:   "add {FILE.patch --fixes CVE | --source DIR} --series SERIES",
		Short: "Put a diff at the end of the queue, or a hand-written livepatch into it",
		Long: `Puts a diff at the end of the queue. With --source, puts a hand-written
livepatch into it instead: a folder with C files and livepatch.toml, which says
what they fix and what they do. A queue holds one or the other. Adding a
hand-written livepatch again takes the place of the one before; the next build
has the next sequence.`,
		Example: `  klatch-forge queue add fix.patch --fixes CVE-2026-12345
  klatch-forge queue add --source livepatch/ --series debian-6.1`,
		Args: func(cmd *cobra.Command, args []string) error {
			if source != "" {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if source != "" {
				return cli.Cannot(addSource(cmd, o, series, source, check), "add the livepatch in %s", source)
			}
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "add %s", args[0])
			}
			ids, err := parseFixes(fixes)
			if err != nil {
				return cli.Cannot(err, "add %s", args[0])
			}
			diff, err := queue.ReadDiff(args[0])
			if err != nil {
				return cli.Cannot(err, "add %s", args[0])
			}
			if name == "" {
				name = strings.TrimSuffix(filepath.Base(args[0]), filepath.Ext(args[0]))
			}
			p := queue.Patch{Name: name, Fixes: ids, Origin: "file " + filepath.Base(args[0]), Author: author(cmd.Context(), who), Diff: diff}
			return cli.Cannot(enqueue(cmd, queue.Open(d.Path, series), p, check), "add %s", args[0])
		},
	}
	c.Flags().StringVar(&series, "series", "debian-6.1", "queue to add to")
	c.Flags().StringVar(&name, "name", "", "name in the queue; default: the file's")
	c.Flags().StringSliceVar(&fixes, "fixes", nil, "CVE that the change fixes; may be repeated (needed for a diff)")
	c.Flags().StringVar(&check, "check", "", "program that shows the flaw; see: klatch-forge queue check --help")
	c.Flags().StringVar(&source, "source", "", "folder of a hand-written livepatch (docs/howto/hand-written-livepatch.md)")
	authorFlag(c, &who)
	c.MarkFlagsMutuallyExclusive("author", "source")
	c.MarkFlagsOneRequired("fixes", "source")
	c.MarkFlagsMutuallyExclusive("fixes", "source")
	c.MarkFlagsMutuallyExclusive("name", "source")
	return c
}

// addSource puts a hand-written livepatch into a queue, its check first.
func addSource(cmd *cobra.Command, o *options, series, dir, check string) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	h, err := queue.ReadHandwritten(dir)
	if err != nil {
		return err
	}
	q := queue.Open(d.Path, series)
	note, err := setChecks(q, h.Fixes, check)
	if err != nil {
		return err
	}
	if err := q.SetHandwritten(h); err != nil {
		return err
	}
	out(cmd, "queue %s: hand-written livepatch for %s (%d functions, %d files), %s\n", q.Series, joinIDs(h.Fixes), len(h.Functions), len(h.Files), note)
	return nil
}

func queueCheck(o *options) *cobra.Command {
	var series string
	c := &cobra.Command{
		Use:   "check CVE PROGRAM --series SERIES",
		Short: "Say how a fix is checked",
		Long: `Stores a program, static or a /bin/sh script for busybox, that shows whether
a flaw is there. It must be benign: read a value, look at an errno. Exit status
1: the flaw shows. 0: it does not. Anything else: could not find out.

klatch-forge test runs it on the kernel before and after the livepatch. A fix
without a check is called unchecked, on every machine that gets it.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "store the check")
			}
			id, err := cve.Parse(args[0])
			if err != nil {
				return cli.Cannot(err, "store the check")
			}
			program, err := os.ReadFile(args[1])
			if err != nil {
				return cli.Cannot(err, "store the check")
			}
			return cli.Cannot(queue.Open(d.Path, series).SetCheck(id, program), "store the check of %s", id)
		},
	}
	c.Flags().StringVar(&series, "series", "debian-6.1", "queue")
	return c
}

func queueDrop(o *options) *cobra.Command {
	var series string
	var source bool
	c := &cobra.Command{
		Use: "drop {NAME | --source} --series SERIES", Short: "Take a source patch, or the hand-written livepatch, out of the queue",
		Long: "Takes a source patch out of the queue. Its file stays for the record; that of a\nhand-written livepatch (--source) does not. The next build has the next sequence;\na livepatch that was published stays published.",
		Args: func(cmd *cobra.Command, args []string) error {
			if source {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(_ *cobra.Command, args []string) error {
			what := "the hand-written livepatch"
			if !source {
				what = args[0]
			}
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "drop %s", what)
			}
			q := queue.Open(d.Path, series)
			if source {
				return cli.Cannot(q.DropHandwritten(), "drop %s", what)
			}
			return cli.Cannot(q.Drop(what), "drop %s", what)
		},
	}
	c.Flags().StringVar(&series, "series", "debian-6.1", "queue")
	c.Flags().BoolVar(&source, "source", false, "the hand-written livepatch")
	return c
}

// queueRow is one source patch as queue list --json has it.
type queueRow struct {
	Name    string   `json:"name"`
	Fixes   []cve.ID `json:"fixes"`
	Files   []string `json:"files"`
	Origin  string   `json:"origin"`
	Checked bool     `json:"checked"`
}

// handwrittenRow is the hand-written livepatch of a queue.
type handwrittenRow struct {
	Fixes     []cve.ID `json:"fixes"`
	Functions []string `json:"functions"` // object:name
	Callbacks []string `json:"callbacks"` // object:time
	Shadows   int      `json:"shadow_variables"`
	Files     []string `json:"files"` // of the queue's folder source
	Checked   bool     `json:"checked"`
}

func listHandwritten(q queue.Queue, h *queue.Handwritten) handwrittenRow {
	r := handwrittenRow{Fixes: h.Fixes, Functions: []string{}, Callbacks: []string{}, Shadows: len(h.Shadows), Checked: checked(q, h.Fixes)}
	for _, f := range h.Functions {
		r.Functions = append(r.Functions, f.Object+":"+f.Name)
	}
	for _, c := range h.Callbacks {
		for _, w := range c.When {
			r.Callbacks = append(r.Callbacks, c.Object+":"+w)
		}
	}
	for _, f := range h.Files {
		r.Files = append(r.Files, f.Name)
	}
	return r
}

func printHandwritten(cmd *cobra.Command, r handwrittenRow) {
	out(cmd, "hand-written livepatch for %s, %s\n    files      %s\n    replaces   %s\n", joinIDs(r.Fixes), checkWord(r.Checked),
		strings.Join(r.Files, " "), strings.Join(r.Functions, " "))
	if len(r.Callbacks) > 0 {
		out(cmd, "    callbacks  %s\n", strings.Join(r.Callbacks, " "))
	}
	if r.Shadows > 0 {
		out(cmd, "    shadow variables  %d\n", r.Shadows)
	}
}

// checked says whether every fix has its check.
func checked(q queue.Queue, ids []cve.ID) bool {
	return !slices.ContainsFunc(ids, func(id cve.ID) bool { return readable(q.CheckFile(id)) != nil })
}

func checkWord(ok bool) string {
	if ok {
		return "checked"
	}
	return "UNCHECKED"
}

func queueList(o *options) *cobra.Command {
	var series string
	var asJSON bool
	c := &cobra.Command{
		Use: "list --series SERIES", Short: "Show a queue in its order", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "list the queue")
			}
			q := queue.Open(d.Path, series)
			ps, err := q.List()
			if err != nil {
				return cli.Cannot(err, "list the queue")
			}
			rows := []queueRow{}
			for _, p := range ps {
				r := queueRow{Name: p.Name, Fixes: p.Fixes, Files: p.Files, Origin: p.Origin}
				r.Checked = checked(q, p.Fixes)
				rows = append(rows, r)
			}
			h, err := q.Handwritten()
			if err != nil {
				return cli.Cannot(err, "list the queue")
			}
			if asJSON {
				doc := map[string]any{"series": series, "patches": rows}
				if h != nil {
					doc["handwritten"] = listHandwritten(q, h)
				}
				return cli.WriteJSON(cmd.OutOrStdout(), 1, doc)
			}
			if h != nil {
				printHandwritten(cmd, listHandwritten(q, h))
			}
			for i, r := range rows {
				out(cmd, "%2d  %-18s %-10s %s\n", i+1, r.Name, checkWord(r.Checked), strings.Join(r.Files, " "))
			}
			return nil
		},
	}
	c.Flags().StringVar(&series, "series", "debian-6.1", "queue")
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	return c
}
