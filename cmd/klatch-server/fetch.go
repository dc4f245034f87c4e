// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/server/fetch"
	"klatch/internal/server/repo"
	"klatch/internal/tufclient"
)

const fetchHelp = `fetch gets single livepatches as files, without a server's data folder: list
what is published, get the newest of each kernel, get some by name, and remove
old ones. Everything is verified against the trust anchor; what the publisher
took back is not fetched. The folder remembers what was seen, so an older
repository is refused.`

type fetchOptions struct {
	from, anchor, dir string
	allowLab, asJSON  bool
	filter            repo.Filter
}

func fetchCommand() *cobra.Command {
	parent := &cobra.Command{
		Use:   "fetch",
		Short: "get single livepatches as files",
		Long:  fetchHelp,
		Example: "  klatch-server fetch list --from https://publisher.example.org/klatch --anchor anchor.json --series 6.1\n" +
			"  klatch-server fetch newest --from URL --anchor anchor.json --dir livepatches\n  klatch-server fetch prune --dir livepatches --keep 2",
		Args: cobra.NoArgs,
	}
	parent.AddCommand(fetchList(), fetchNewest(), fetchGet(), fetchPrune())
	return parent
}

// flags are those of the commands that look at a repository.
func (o *fetchOptions) flags(c *cobra.Command, filter bool) {
	f := c.Flags()
	f.StringVar(&o.from, "from", "", "address or folder of the repository")
	f.StringVar(&o.anchor, "anchor", "", "the publisher's trust anchor file")
	f.StringVar(&o.dir, "dir", ".", "folder of the files")
	f.BoolVar(&o.allowLab, "allow-lab", false, "accept an anchor with lab keys, which lie unprotected on one machine")
	f.BoolVar(&o.asJSON, "json", false, "print the result for programs")
	if filter {
		filterFlags(f, &o.filter)
	}
	for _, name := range []string{"from", "anchor"} {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is above
		}
	}
}

// look verifies what is published. done ends the use of the network.
func (o *fetchOptions) look(cmd *cobra.Command) (p *fetch.Published, done func(), err error) {
	if err := (repo.Rules{Filter: o.filter}).Validate(); err != nil {
		return nil, nil, err
	}
	a, err := loadAnchor(o.anchor, o.allowLab)
	if err != nil {
		return nil, nil, err
	}
	t := plainTransport()
	base, client, err := tufclient.Source(o.from, &http.Client{Transport: t, CheckRedirect: sameHost})
	if err != nil {
		return nil, nil, err
	}
	if strings.HasPrefix(base, "http") {
		client.Transport = tufclient.Saver{Next: t, Dir: filepath.Join(o.dir, ".klatch-fetch", "transfer")}
	}
	p, err = fetch.Look(cmd.Context(), fetch.Source{Anchor: a, BaseURL: base, Client: client, Dir: o.dir}, time.Now())
	return p, t.CloseIdleConnections, err
}

// item is a livepatch for programs.
type item struct {
	Target   string             `json:"target"`
	Release  string             `json:"kernel_release"`
	BuildID  string             `json:"build_id,omitempty"`
	Sequence livepatch.Sequence `json:"sequence"`
	Fixes    []livepatch.Fix    `json:"fixes"`
	Released time.Time          `json:"released_at,omitzero"`
	Bytes    int64              `json:"bytes"`
	SHA256   string             `json:"sha256"`
	Recalled bool               `json:"recalled"`
	Fresh    bool               `json:"fetched,omitempty"`
}

func itemOf(i fetch.Item) item {
	x := item{Target: i.Target.Path, Release: i.Place.Release, Sequence: i.Sequence, Fixes: i.Listed.Fixes, Released: i.Listed.Released,
		Bytes: i.Target.Bytes, SHA256: i.Target.SHA256, Recalled: i.Recalled}
	if i.Listed.Kernel.ID != (kernel.BuildID{}) {
		x.BuildID = i.Listed.Kernel.ID.String()
	}
	return x
}

func fetchList() *cobra.Command {
	var o fetchOptions
	var newest bool
	c := &cobra.Command{
		Use:   "list",
		Short: "list what is published",
		Long:  "list verifies the signed lists and prints the livepatches in them that the\nfilter lets through. It fetches no livepatch.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, done, err := o.look(cmd)
			if err != nil {
				return cli.Cannot(err, "list %s", o.from)
			}
			defer done()
			list := []item{}
			for _, i := range p.Choose(o.filter, newest) {
				list = append(list, itemOf(i))
			}
			if o.asJSON {
				return printItems(cmd.OutOrStdout(), p, list)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "LIVEPATCH\tFIXES\tBYTES\tRELEASED\tRECALLED") //nolint:errcheck // Flush tells
			for _, x := range list {
				released, recalled := "not told", "no"
				if !x.Released.IsZero() {
					released = x.Released.UTC().Format(time.RFC3339)
				}
				if x.Recalled {
					recalled = "yes"
				}
				fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\n", x.Target, len(x.Fixes), x.Bytes, released, recalled) //nolint:errcheck // Flush tells
			}
			return w.Flush()
		},
	}
	o.flags(c, true)
	c.Flags().BoolVar(&newest, "newest", false, "only the newest of each kernel that was not taken back")
	return c
}

func printItems(w io.Writer, p *fetch.Published, list []item) error {
	return cli.WriteJSON(w, 1, struct {
		Metadata    int64     `json:"metadata_version"`
		Expires     time.Time `json:"metadata_expires"`
		Livepatches []item    `json:"livepatches"`
	}{p.Version, p.Expires, list})
}

func fetchNewest() *cobra.Command {
	var o fetchOptions
	c := &cobra.Command{
		Use:   "newest",
		Short: "get the newest livepatch of each kernel",
		Long:  "newest gets, for each kernel that the filter lets through, the newest livepatch\nthat was not taken back, with its evidence and its proof.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, done, err := o.look(cmd)
			if err != nil {
				return cli.Cannot(err, "fetch from %s", o.from)
			}
			defer done()
			return cli.Cannot(o.get(cmd, p, p.Choose(o.filter, true)), "fetch from %s", o.from)
		},
	}
	o.flags(c, true)
	return c
}

func fetchGet() *cobra.Command {
	var o fetchOptions
	c := &cobra.Command{
		Use:   "get LIVEPATCH...",
		Short: "get livepatches by name",
		Long:  "get fetches livepatches by the names that list prints, with their evidence and\nproofs.",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, done, err := o.look(cmd)
			if err != nil {
				return cli.Cannot(err, "fetch from %s", o.from)
			}
			defer done()
			var list []fetch.Item
			for _, name := range args {
				i, err := p.Find(name)
				if err != nil {
					return cli.Cannot(err, "fetch from %s", o.from)
				}
				list = append(list, i)
			}
			return cli.Cannot(o.get(cmd, p, list), "fetch from %s", o.from)
		},
	}
	o.flags(c, false)
	return c
}

func (o *fetchOptions) get(cmd *cobra.Command, p *fetch.Published, list []fetch.Item) error {
	steps := cli.NewProgress(cmd.ErrOrStderr())
	got := []item{}
	for n, i := range list {
		steps.Step("%d of %d: %s (%d bytes)", n+1, len(list), i.Target.Path, i.Target.Bytes)
		fresh, err := p.Get(cmd.Context(), i)
		if err != nil {
			return err
		}
		x := itemOf(i)
		x.Fresh = fresh
		got = append(got, x)
	}
	if o.asJSON {
		return printItems(cmd.OutOrStdout(), p, got)
	}
	for _, x := range got {
		what := "was here"
		if x.Fresh {
			what = "fetched"
		}
		if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s  %s\n", filepath.Join(o.dir, filepath.FromSlash(x.Target)), what); err != nil {
			return err
		}
	}
	return nil
}

func fetchPrune() *cobra.Command {
	var dir string
	var keep int
	var asJSON bool
	c := &cobra.Command{
		Use:   "prune --keep N",
		Short: "remove older livepatches from the folder",
		Long:  "prune keeps the N newest livepatches of each kernel in the folder and removes\nthe others with their evidence and proofs. It needs no network.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			removed, err := fetch.Prune(dir, keep)
			if err != nil {
				return cli.Cannot(err, "prune %s", dir)
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"removed": append([]string{}, removed...)})
			}
			for _, r := range removed {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "removed %s\n", r); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", ".", "folder of the files")
	c.Flags().IntVar(&keep, "keep", 2, "how many of each kernel stay")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}
