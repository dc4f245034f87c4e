// SPDX-License-Identifier: Apache-2.0

package notices

import (
	"cmp"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/flood"
	"klatch/internal/kernel"
)

// byQueue is the policy of the ledger that builds of the queue write.
const byQueue = "queue"

// queueLedger is its file: ledger/RELEASE_queue.json.
func queueLedger(d datadir.Dir, r kernel.Release) string {
	return filepath.Join(d.Path, "ledger", string(r)+"_"+byQueue+".json")
}

// Keep writes down which CVEs of the queue the builder refused for a kernel, and
// forgets those that it built since. A source patch that leaves the queue leaves
// its refusal: that is what was found out.
func Keep(d datadir.Dir, p compose.Plan, res build.Result) error {
	if res.Result != build.Refused && res.Result != build.Built {
		return nil
	}
	e := p.Kernel
	file := queueLedger(d, e.Release)
	l := flood.Ledger{Version: 1, Kernel: e.Release, BuildID: e.BuildID, From: e.SourceV, To: e.SourceV, Policy: byQueue}
	b, err := durable.ReadFile(file, maxLedger)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		var old flood.Ledger
		// One that cannot be read, or of another build of the release, is begun anew.
		if json.Unmarshal(b, &old) == nil && old.Version == l.Version && old.BuildID == l.BuildID {
			l = old
		}
	}
	fresh := refusals(p, res)
	gone := func(id cve.ID) bool { return res.Result == build.Built && slices.Contains(res.Fixes, id) }
	l.Entries = slices.DeleteFunc(l.Entries, func(x flood.Entry) bool {
		return gone(x.CVE) || slices.ContainsFunc(fresh, func(y flood.Entry) bool { return x.CVE == y.CVE })
	})
	l.Entries = append(l.Entries, fresh...)
	if len(l.Entries) == 0 && b == nil {
		return nil
	}
	slices.SortFunc(l.Entries, func(x, y flood.Entry) int { return cve.Compare(x.CVE, y.CVE) })
	l.Count()
	next, err := json.MarshalIndent(l, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(file, append(next, '\n'), 0o644)
}

// refusals finds the CVEs of the source patches that a refusal is about: those
// of the file, or of the header through which it was reached.
func refusals(p compose.Plan, res build.Result) []flood.Entry {
	var out []flood.Entry
	for _, r := range res.Refusals {
		if r.Code == "nothing_changed" || r.Code == "not_built" {
			continue // that is no refusal of a fix, but a fix that this kernel does not need
		}
		for _, s := range p.Patches {
			if !slices.Contains(s.Files, r.File) && !slices.ContainsFunc(r.Through, func(f string) bool { return slices.Contains(s.Files, f) }) {
				continue
			}
			for _, id := range s.Fixes {
				if !slices.ContainsFunc(out, func(x flood.Entry) bool { return x.CVE == id }) {
					out = append(out, flood.Entry{CVE: id, Status: flood.Refused, Code: r.Code, Reason: r.Rule, File: r.File, Place: cmp.Or(r.Function, r.Type, r.Section), Files: s.Files})
				}
			}
		}
	}
	return out
}
