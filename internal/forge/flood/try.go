// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"klatch/internal/forge/build"
)

// together tries the lots in batches. Where a batch is refused, the lots that
// the refusals can be blamed on are taken out and tried alone; the rest goes
// on together. It returns those that pass.
func (r *runner) together(ctx context.Context, lots []*lot) ([]*lot, error) {
	var passed, alone []*lot
	batches := r.batches(lots)
	for i, batch := range batches {
		for len(batch) > 0 {
			r.Tell("batch %d of %d: %d lots together", i+1, len(batches), len(batch))
			res, err := r.check(ctx, batch)
			if err != nil {
				return nil, err
			}
			if res.Result == build.Built || res.Result == build.NotAffected {
				mark(batch, res)
				passed = append(passed, batch...)
				break
			}
			blamed, rest := blame(batch, res.Refusals)
			if len(blamed) == 0 { // nobody to blame: everybody is
				blamed, rest = batch, nil
			}
			r.Tell("batch %d of %d: %d lots refused or near to one that is", i+1, len(batches), len(blamed))
			if len(batch) == 1 {
				batch[0].refused, batch[0].alone = res.Refusals, true
				blamed = nil
			}
			alone = append(alone, blamed...)
			batch = rest
		}
	}
	ok, err := r.eachAlone(ctx, alone)
	return append(passed, ok...), err
}

// batches fills batches by the source files that they reach; a lot that is
// refused already is in none.
func (r *runner) batches(lots []*lot) [][]*lot {
	var out [][]*lot
	var batch []*lot
	reached := map[string]bool{}
	for _, l := range lots {
		if len(l.refused) > 0 {
			continue
		}
		for _, s := range l.sources {
			reached[s] = true
		}
		if len(batch) > 0 && len(reached) > r.Batch {
			out = append(out, batch)
			batch, reached = nil, map[string]bool{}
			for _, s := range l.sources {
				reached[s] = true
			}
		}
		batch = append(batch, l)
	}
	if len(batch) > 0 {
		out = append(out, batch)
	}
	return out
}

// eachAlone tries lots one by one, a few at once.
func (r *runner) eachAlone(ctx context.Context, lots []*lot) ([]*lot, error) {
	var g errgroup.Group
	g.SetLimit(r.Parallel)
	for i, l := range lots {
		g.Go(func() error {
			res, err := r.check(ctx, []*lot{l})
			if err != nil {
				return err
			}
			l.alone = true
			if res.Result == build.Refused {
				l.refused = res.Refusals
			} else {
				mark([]*lot{l}, res)
			}
			word := "passes"
			if len(l.refused) > 0 {
				word = fmt.Sprintf("refused: %s", l.refused[0].Code)
			}
			r.Tell("alone %d of %d: %s %s", i+1, len(lots), l.name(), word)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(lots), func(l *lot) bool { return len(l.refused) > 0 }), nil
}

// settle tries all lots that passed together, and takes out those that do not
// pass in company until the rest does. Lots that change nothing stay: what
// they share with others may.
func (r *runner) settle(ctx context.Context, lots []*lot) ([]*lot, error) {
	for len(lots) > 0 {
		r.Tell("all %d lots that passed, together", len(lots))
		res, err := r.check(ctx, lots)
		if err != nil {
			return nil, err
		}
		if res.Result != build.Refused {
			mark(lots, res) // with all that goes along: in a batch, another lot may have changed the same file
			return slices.DeleteFunc(lots, func(l *lot) bool { return l.inert }), nil
		}
		blamed, rest := blame(lots, res.Refusals)
		if len(blamed) == 0 || len(rest) == 0 && len(lots) > 1 {
			return nil, fmt.Errorf("the lots pass apart but not together, and none can be blamed: %s: %s", res.Refusals[0].File, res.Refusals[0].Code)
		}
		for _, l := range blamed {
			for _, f := range res.Refusals {
				if touches(l, f) {
					l.refused = append(l.refused, f)
				}
			}
		}
		lots = rest
	}
	return nil, nil
}

// check builds some lots as one, but for the link. What an earlier run found
// out is not built again.
func (r *runner) check(ctx context.Context, lots []*lot) (build.Result, error) {
	set := nodes{}
	for _, l := range lots {
		for n := range l.nodes {
			set[n] = true
		}
	}
	p, err := r.plan(ctx, set)
	if err != nil {
		return build.Result{}, err
	}
	digest, err := p.Digest()
	if err != nil {
		return build.Result{}, err
	}
	if f, ok := r.State.Found(digest); ok {
		return f, nil
	}
	res, err := r.b.Check(ctx, p, build.NewClock(nil))
	if err != nil {
		return res, fmt.Errorf("check %s: %w", lots[0].name(), err)
	}
	return res, r.State.Keep(digest, res)
}

// mark notes which lots change no object code.
func mark(lots []*lot, res build.Result) {
	for _, l := range lots {
		l.inert = res.Result == build.NotAffected || !slices.ContainsFunc(l.sources, func(s string) bool { return !slices.Contains(res.Unchanged, s) })
	}
}

// blame tells the lots that touch a refused file, or a file through which it
// was reached, from the others.
func blame(lots []*lot, refusals []build.Refusal) (blamed, rest []*lot) {
	for _, l := range lots {
		if slices.ContainsFunc(refusals, func(f build.Refusal) bool { return touches(l, f) }) {
			blamed = append(blamed, l)
		} else {
			rest = append(rest, l)
		}
	}
	return blamed, rest
}

func touches(l *lot, f build.Refusal) bool {
	for n := range l.nodes {
		if n.file == f.File || slices.Contains(f.Through, n.file) || slices.Contains(strings.Split(f.File, ", "), n.file) {
			return true
		}
	}
	return false
}
