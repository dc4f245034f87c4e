// SPDX-License-Identifier: Apache-2.0

// Package notices joins what the publisher's data folder knows of a kernel build
// into what its machines are told (package notice): the catalog's support, the
// ledgers' refusals, and what persons decided. It is a function of that text:
// no clock, no key, and nothing is remembered.
//
// Only what is known to be true of exactly this kernel build is told. That a
// CVE is refused there its ledger says, which names the build; a person's
// decision speaks of a series, so something must say that the flaw is in this
// build of it: a ledger that lists the CVE, or the decision's fixed_in. What a
// build of the queue refused (Keep) is work in progress: it is told with the
// builder's code once a person decided reboot.
//
// Start with Targets.
package notices

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/changelog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/flood"
	"klatch/internal/forge/triage"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/notice"
	"klatch/internal/tufrepo"
)

// Known is all that the data folder knows.
type Known struct {
	Kernels []catalog.Entry
	Ledgers []flood.Ledger // a later one goes before an earlier one
	Reviews triage.Reviews
}

// maxLedger limits one ledger, in bytes: 14,600 CVEs with their files.
const maxLedger = 64 << 20

// Read reads what the data folder knows.
func Read(d datadir.Dir, now time.Time) (Known, error) {
	var k Known
	var err error
	if k.Kernels, err = catalog.List(d.Path); err != nil {
		return k, err
	}
	if k.Reviews, err = triage.Load(d.Path, now); err != nil {
		return k, err
	}
	files, err := filepath.Glob(filepath.Join(d.Path, "ledger", "*.json"))
	if err != nil {
		return k, err
	}
	for _, f := range files {
		b, err := durable.ReadFile(f, maxLedger)
		if err != nil {
			return k, err
		}
		var l flood.Ledger
		if err := json.NewDecoder(bytes.NewReader(b)).Decode(&l); err != nil || l.Version != 1 {
			return k, fault.New(fault.Invalid, "bad_ledger", "read %s: not a ledger of version 1: %v", f, err).
				WithHint("make it again with klatch-forge import-delta --dry-run, or remove it")
		}
		k.Ledgers = append(k.Ledgers, l)
	}
	slices.SortStableFunc(k.Ledgers, func(a, b flood.Ledger) int {
		n, e := changelog.Compare(a.To, b.To)
		if e != nil {
			err = fmt.Errorf("compare the ledgers of %s: %w", a.Kernel, e)
		}
		return n
	})
	return k, err
}

// Targets makes the notices of all kernels of the catalog. signed are the
// livepatches that are published with them: what they fix is refused no longer.
// Of a kernel of which nothing is known there is none; one that was published
// before is withdrawn.
func Targets(d datadir.Dir, signed []build.Result, now time.Time) (add []tufrepo.Target, withdraw []string, err error) {
	k, err := Read(d, now)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range k.Kernels {
		n, _ := k.On(e, Fixed(signed, e.BuildID))
		path := notice.TargetPath(n.Kernel)
		if n.Empty() {
			withdraw = append(withdraw, path)
			continue
		}
		content, err := n.Encode()
		if err != nil {
			return nil, nil, err
		}
		custom, err := json.Marshal(custom{notice.Format, n.Kernel})
		if err != nil {
			return nil, nil, err
		}
		add = append(add, tufrepo.Target{Path: path, Content: content, Custom: custom, Replace: true})
	}
	return add, withdraw, nil
}

// custom lets a mirror tell whom a notice is for without opening it.
type custom struct {
	Format string       `json:"format"`
	Kernel kernel.Build `json:"kernel"`
}

// Fixed lists what the newest of the livepatches of a kernel build fixes: they
// are cumulative.
func Fixed(signed []build.Result, id kernel.BuildID) []cve.ID {
	var newest livepatch.Sequence
	var fixes []cve.ID
	for _, b := range signed {
		if b.BuildID == id && b.Sequence > newest {
			newest, fixes = b.Sequence, b.Fixes
		}
	}
	return fixes
}

// Untold is a person's decision of which nobody knows whether it concerns a
// kernel build.
type Untold struct {
	CVE       cve.ID           `json:"cve"`
	Treatment triage.Treatment `json:"treatment"`
	File      string           `json:"file"`
}

// On is the notice on one kernel, and what could not be said in it.
func (k Known) On(e catalog.Entry, fixed []cve.ID) (notice.Notice, []Untold) {
	n := notice.Notice{Format: notice.Format, Kernel: e.Build(), Support: e.Support.Notice(), CVEs: []notice.CVE{}}
	told, refused := map[cve.ID]notice.CVE{}, map[cve.ID]notice.CVE{}
	stands := map[cve.ID]flood.Status{} // in the newest ledger that lists it
	for _, l := range k.Ledgers {
		if l.BuildID != e.BuildID {
			continue
		}
		for _, x := range l.Entries {
			stands[x.CVE] = x.Status
			delete(refused, x.CVE)
			if x.Status == flood.Refused {
				refused[x.CVE] = notice.CVE{ID: x.CVE, Code: x.Code, Text: refusalText(x), Advice: notice.Reboot}
			}
			if l.Policy == stressTest || l.Policy == byQueue {
				continue // the first asks for what no fleet asks for
			}
			delete(told, x.CVE)
			if r, ok := refused[x.CVE]; ok {
				told[x.CVE] = r
			}
		}
	}
	var untold []Untold
	for id, v := range k.Reviews {
		if !v.For(e.Series) {
			continue
		}
		switch v.Treatment {
		case triage.Reboot, triage.Defer:
			switch concerns(v, e, stands[id]) {
			case yes:
				told[id] = decided(v, refused[id])
			case unknown:
				untold = append(untold, Untold{id, v.Treatment, v.Path()})
			case no:
				delete(told, id)
			}
		case triage.NotAffected, triage.BelowPolicy:
			delete(told, id)
		case triage.Livepatch, triage.Unrated, triage.NoData: // they change nothing that was found out
		}
	}
	for id, c := range told {
		if !slices.Contains(fixed, id) {
			n.CVEs = append(n.CVEs, c)
		}
	}
	slices.SortFunc(n.CVEs, func(a, b notice.CVE) int { return cve.Compare(a.ID, b.ID) })
	slices.SortFunc(untold, func(a, b Untold) int { return cve.Compare(a.CVE, b.CVE) })
	return n, untold
}

// stressTest is the policy that takes every CVE.
const stressTest = "everything"

type answer int

const (
	unknown answer = iota
	yes
	no
)

// concerns says whether the flaw of a decision is in a kernel build.
func concerns(v triage.Reviewed, e catalog.Entry, stands flood.Status) answer {
	if v.FixedIn != "" {
		switch n, err := changelog.Compare(e.SourceV, v.FixedIn); {
		case err != nil:
			return unknown
		case n >= 0:
			return no
		}
	}
	switch {
	case stands == flood.NotAffected:
		return no
	case stands != "" || v.FixedIn != "":
		return yes
	default:
		return unknown
	}
}

// decided says what a person decided, and keeps the builder's reason where
// there is one.
func decided(v triage.Reviewed, refused notice.CVE) notice.CVE {
	c := notice.CVE{ID: v.CVE, Code: notice.Decided, Text: notice.OneLine(v.Reason), Advice: notice.Reboot}
	if v.Treatment == triage.Defer {
		c.Code, c.Advice = notice.Deferred, notice.Wait
		return c
	}
	if refused.Code != "" {
		c.Code, c.Text = refused.Code, refused.Text
	}
	return c
}

func refusalText(x flood.Entry) string {
	place := x.File
	if x.Place != "" {
		place = strings.TrimPrefix(place+", "+x.Place, ", ")
	}
	if place != "" {
		return notice.OneLine(place + ": " + x.Reason)
	}
	return notice.OneLine(x.Reason)
}
