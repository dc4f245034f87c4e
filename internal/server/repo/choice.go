// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/server/blob"
	"klatch/internal/tufclient"
)

// Why says for what reason a signed target is not in a copy, and should not
// be. The words are stored and sent: never rename one.
type Why string

// The reasons.
const (
	ByFilter   Why = "filter"       // this mirror's filter
	ByAge      Why = "age"          // younger than this mirror wants them
	AgeUnknown Why = "age_unknown"  // the signed list does not say when it was released
	ByUpstream Why = "upstream"     // the mirror above leaves it out
	NotThere   Why = "not_imported" // the export did not hold it
)

// Text says it to a person.
func (l LeftOut) Text() string {
	text := map[Why]string{
		ByFilter:   "this server's filter",
		ByAge:      "younger than this server's minimum age",
		AgeUnknown: "the publisher's list does not say how old it is",
		ByUpstream: "the mirror above leaves it out",
		NotThere:   "it was not in the imported file",
	}[l.Why]
	if !l.Until.IsZero() {
		text += ", until " + l.Until.Format(time.RFC3339)
	}
	return l.Target + ": " + text
}

// LeftOut is one signed target that is not here on purpose.
type LeftOut struct {
	Target   string             `json:"target"`
	Why      Why                `json:"why"`
	Until    time.Time          `json:"until,omitzero"` // for ByAge
	Kernel   kernel.Build       `json:"-"`              // without a build id where the list tells none
	Sequence livepatch.Sequence `json:"-"`
}

// leftOutFile lies beside metadata/. It tells this server after a restart,
// and the mirrors below it, what is left out and why. It is not signed: who
// writes it could as well withhold the files. Each machine and each mirror
// sees in the signed list what there should be.
const (
	leftOutFile   = "left-out.json"
	leftOutFormat = "klatch-left-out/1"
	maxLeftOut    = 8 << 20
)

type leftOutList struct {
	Format  string    `json:"format"`
	Targets []LeftOut `json:"targets"`
}

func encodeLeftOut(list []LeftOut) ([]byte, error) {
	if list == nil {
		list = []LeftOut{}
	}
	b, err := json.MarshalIndent(leftOutList{leftOutFormat, list}, "", " ")
	return append(b, '\n'), err
}

// parseLeftOut reads the list of any server, by target path.
func parseLeftOut(b []byte) (map[string]LeftOut, error) {
	var l leftOutList
	if err := json.Unmarshal(b, &l); err != nil || l.Format != leftOutFormat {
		return nil, fault.New(fault.Untrusted, "left_out_malformed", "%s is not a list of format %s: %w", leftOutFile, leftOutFormat, err)
	}
	m := map[string]LeftOut{}
	for _, t := range l.Targets {
		m[t.Target] = t
	}
	return m, nil
}

// choose divides the signed targets into those to copy and those to leave out.
// It is pure: absent says what the source does not have, and why.
func choose(targets []tufclient.Target, rules Rules, absent func(tufclient.Target) (Why, bool), now time.Time) (take []tufclient.Target, left []LeftOut) {
	listed := map[string]livepatch.Listed{}
	for _, t := range targets {
		if l, ok := livepatch.ParseListed(t.Custom); ok {
			listed[t.Path] = l
		}
	}
	for _, t := range targets {
		l := about(t, listed)
		if place, ofKernel := livepatch.PlaceOf(t.Path); ofKernel {
			if !rules.Filter.Match(place) {
				l.Why = ByFilter
			} else {
				l.Why, l.Until = tooYoung(listed, t.Path, rules.MinAge, now)
			}
		}
		if why, gone := absent(t); l.Why == "" && gone {
			l.Why = why
		}
		if l.Why == "" {
			take = append(take, t)
			continue
		}
		left = append(left, l)
	}
	return take, left
}

// tooYoung asks the signed list about a livepatch, or about the one that a
// file of evidence or a proof goes with.
func tooYoung(listed map[string]livepatch.Listed, target string, least time.Duration, now time.Time) (Why, time.Time) {
	if least == 0 {
		return "", time.Time{}
	}
	l, ok := listed[livepatch.BundleOf(target)]
	if !ok || l.Released.IsZero() {
		return AgeUnknown, time.Time{}
	}
	if until := l.Released.Add(least); now.Before(until) {
		return ByAge, until.UTC()
	}
	return "", time.Time{}
}

func about(t tufclient.Target, listed map[string]livepatch.Listed) LeftOut {
	l := LeftOut{Target: t.Path}
	if x, ok := listed[livepatch.BundleOf(t.Path)]; ok {
		l.Kernel, l.Sequence = x.Kernel, x.Sequence
		return l
	}
	if p, ok := livepatch.PlaceOf(t.Path); ok {
		l.Kernel = kernel.Build{Distro: kernel.Distro(p.Distro), Arch: kernel.Arch(p.Arch), Release: kernel.Release(p.Release)}
		name := t.Path[strings.LastIndexByte(t.Path, '/')+1:]
		name, _, _ = strings.Cut(name, ".")
		l.Sequence, _ = livepatch.SequenceOf(name)
	}
	return l
}

// bundlesOf keeps the livepatches: their evidence and proofs go with them.
func bundlesOf(left []LeftOut) []LeftOut {
	return slices.DeleteFunc(slices.Clone(left), func(l LeftOut) bool { return !strings.HasSuffix(l.Target, livepatch.BundleSuffix) })
}

// Absent is what fleet asks about a machine for which nothing is offered.
func (c *Catalog) Absent() []fleet.Absent {
	list := make([]fleet.Absent, len(c.LeftOut))
	for i, l := range c.LeftOut {
		list[i] = fleet.Absent{Kernel: l.Kernel, Sequence: l.Sequence, Why: string(l.Why)}
	}
	return list
}

// fingerprint tells two choices apart.
func fingerprint(take []tufclient.Target, left []LeftOut) string {
	h := sha256.New()
	for _, t := range take {
		fmt.Fprintf(h, "+%s %s\n", t.Path, t.SHA256) //nolint:errcheck // a hash takes all
	}
	for _, l := range left {
		fmt.Fprintf(h, "-%s %s %d\n", l.Target, l.Why, l.Until.Unix()) //nolint:errcheck // as above
	}
	return hex.EncodeToString(h.Sum(nil))
}

// readLeftOut gives our own list; none is an empty one.
func (r *Repo) readLeftOut(ctx context.Context) (list map[string]LeftOut, digest string, err error) {
	b, err := blob.Read(ctx, r.files, leftOutFile, maxLeftOut)
	if fault.KindOf(err) == fault.NotFound {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(b)
	list, err = parseLeftOut(b)
	return list, hex.EncodeToString(sum[:]), err
}

// writeLeftOut replaces our own list and gives its digest. An empty one is not
// written where there was none: a copy of everything looks like the source.
func (r *Repo) writeLeftOut(ctx context.Context, list []LeftOut) (string, error) {
	b, err := encodeLeftOut(list)
	if err != nil {
		return "", err
	}
	if _, digest, err := r.readLeftOut(ctx); len(list) == 0 && digest == "" && err == nil {
		return "", nil
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), r.putFile(ctx, leftOutFile, b)
}
