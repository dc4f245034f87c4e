// SPDX-License-Identifier: Apache-2.0

// Package fetch is the downloader: it gets single livepatches of a repository
// into a folder, verified by the trust anchor, for people who want files and no
// server. It remembers in the folder what it has seen, so that an older
// repository is refused there too. Start with Look.
package fetch

import (
	"cmp"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/server/repo"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// memoryDir is below the folder.
const memoryDir = ".klatch-fetch"

// maxBeside limits evidence and proofs, in bytes.
const maxBeside = 4 << 20

// Source is what to trust and where to look.
type Source struct {
	Anchor  *trust.Anchor
	BaseURL string
	Client  *http.Client
	Dir     string // files and memory
}

// Item is one livepatch as the signed list describes it.
type Item struct {
	Target   tufclient.Target
	Place    livepatch.Place
	Listed   livepatch.Listed // without a build id where the list tells nothing
	Sequence livepatch.Sequence
	Recalled bool
}

// Published is what the repository offers now.
type Published struct {
	Items    []Item // by kernel release, newest sequence first
	Version  int64
	Expires  time.Time
	src      Source
	snapshot *tufclient.Snapshot
}

// Look verifies the newest metadata and recalls.
func Look(ctx context.Context, src Source, now time.Time) (*Published, error) {
	memory := filepath.Join(src.Dir, memoryDir)
	if err := os.MkdirAll(memory, 0o700); err != nil {
		return nil, err
	}
	unlock, err := durable.Lock(filepath.Join(memory, ".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock() //nolint:errcheck // the process ends soon
	s, err := tufclient.Refresh(ctx, tufclient.Config{Root: src.Anchor.Root, Dir: memory, BaseURL: src.BaseURL, Client: src.Client, Now: now})
	if err != nil {
		return nil, err
	}
	recalls, err := repo.Recalls(src.Anchor, s.Targets(), func(t tufclient.Target) ([]byte, error) { return s.Download(ctx, t, livepatch.MaxRecalls) })
	if err != nil {
		return nil, err
	}
	p := &Published{Version: s.Timestamp, Expires: s.Expires, src: src, snapshot: s}
	for _, t := range s.Targets() {
		place, ok := livepatch.PlaceOf(t.Path)
		if !ok || !strings.HasSuffix(t.Path, livepatch.BundleSuffix) {
			continue
		}
		i := Item{Target: t, Place: place, Sequence: sequenceOf(t.Path)}
		if l, ok := livepatch.ParseListed(t.Custom); ok {
			i.Listed, i.Sequence = l, l.Sequence
			i.Recalled = recalls.Check(l.Kernel.ID, l.Sequence) != nil
		}
		p.Items = append(p.Items, i)
	}
	slices.SortFunc(p.Items, func(a, b Item) int {
		return cmp.Or(strings.Compare(a.Place.Distro, b.Place.Distro), strings.Compare(a.Place.Release, b.Place.Release), cmp.Compare(b.Sequence, a.Sequence))
	})
	return p, nil
}

func sequenceOf(target string) livepatch.Sequence {
	name, _, _ := strings.Cut(target[strings.LastIndexByte(target, '/')+1:], ".")
	s, _ := livepatch.SequenceOf(name)
	return s
}

// Choose keeps those that a filter lets through, and of each kernel only the
// newest that nobody took back, if that is asked.
func (p *Published) Choose(f repo.Filter, newest bool) []Item {
	var out []Item
	seen := map[livepatch.Place]bool{}
	for _, i := range p.Items {
		if !f.Match(i.Place) || newest && (i.Recalled || seen[i.Place]) {
			continue
		}
		seen[i.Place] = true
		out = append(out, i)
	}
	return out
}

// Find gives a livepatch by its target path.
func (p *Published) Find(name string) (Item, error) {
	i := slices.IndexFunc(p.Items, func(i Item) bool { return i.Target.Path == name })
	if i < 0 {
		return Item{}, fault.New(fault.NotFound, "target_missing", "livepatch %.200q is not published", name).
			WithHint("names are those of: klatch-server fetch list")
	}
	return p.Items[i], nil
}

// Get writes a livepatch with its evidence and proof below the folder, under
// the names that they are published by. All of it is verified before; a file
// that is there and whole stays. It says whether anything was written.
func (p *Published) Get(ctx context.Context, i Item) (fresh bool, err error) {
	if i.Recalled {
		return false, fault.New(fault.Untrusted, "recalled", "livepatch %s was taken back by its publisher", i.Target.Path).
			WithHint("take a higher sequence of the same kernel: klatch-server fetch list")
	}
	fresh, err = p.put(ctx, i.Target, livepatch.MaxBundle, func(b []byte) error {
		_, err := repo.Verify(p.src.Anchor, i.Target, b)
		return err
	})
	if err != nil {
		return fresh, err
	}
	for _, t := range p.snapshot.Targets() {
		if t.Path == i.Target.Path || livepatch.BundleOf(t.Path) != i.Target.Path {
			continue
		}
		if _, err := p.put(ctx, t, maxBeside, func([]byte) error { return nil }); err != nil {
			return fresh, err
		}
	}
	return fresh, nil
}

func (p *Published) put(ctx context.Context, t tufclient.Target, limit int64, verify func([]byte) error) (fresh bool, err error) {
	name := filepath.Join(p.src.Dir, filepath.FromSlash(t.Path))
	if b, err := durable.ReadFile(name, limit); err == nil && t.Is(b) {
		return false, verify(b)
	}
	b, err := p.snapshot.Download(ctx, t, limit)
	if err != nil {
		return false, err
	}
	if err := verify(b); err != nil {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return false, err
	}
	return true, durable.WriteFile(name, b, 0o644)
}

// filePattern is a file that Get may have written.
var filePattern = regexp.MustCompile(`^(klatch_[1-9][0-9]{0,9})(\` + livepatch.BundleSuffix + `|\.evidence\.json|\` + translog.ProofSuffix + `)$`)

// Prune removes the livepatches below the folder but the newest of each kernel,
// as many as are to be kept, and says which. It needs no network, and leaves
// everything alone that Get has not written.
func Prune(dir string, keep int) (removed []string, err error) {
	if keep < 1 {
		return nil, fault.New(fault.Invalid, "bad_keep", "keep %d livepatches of each kernel: want 1 or more", keep)
	}
	bundles, err := filepath.Glob(filepath.Join(dir, "*", "*", "*", "klatch_*"))
	if err != nil {
		return nil, err
	}
	of := map[string]map[livepatch.Sequence][]string{} // by folder
	for _, b := range bundles {
		m := filePattern.FindStringSubmatch(filepath.Base(b))
		if m == nil {
			continue
		}
		s, ok := livepatch.SequenceOf(m[1])
		if _, ofKernel := livepatch.PlaceOf(relative(dir, b)); !ok || !ofKernel {
			continue
		}
		if of[filepath.Dir(b)] == nil {
			of[filepath.Dir(b)] = map[livepatch.Sequence][]string{}
		}
		of[filepath.Dir(b)][s] = append(of[filepath.Dir(b)][s], b)
	}
	for _, sequences := range of {
		var order []livepatch.Sequence
		for s := range sequences {
			order = append(order, s)
		}
		slices.SortFunc(order, func(a, b livepatch.Sequence) int { return cmp.Compare(b, a) })
		for _, s := range order[min(keep, len(order)):] {
			for _, name := range sequences[s] {
				if err := durable.Remove(name); err != nil {
					return removed, err
				}
				removed = append(removed, relative(dir, name))
			}
		}
	}
	slices.Sort(removed)
	return removed, nil
}

func relative(dir, name string) string {
	rel, err := filepath.Rel(dir, name)
	if err != nil {
		return name
	}
	return filepath.ToSlash(rel)
}
