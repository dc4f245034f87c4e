// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Words says what a draft means, computed from the parts that would be signed
// and never from its own text about itself. For each part there is what it
// changes against what is in force, then everything that it will say, so that
// a wrong "in force" cannot hide a key, and a digest that the holders of the
// keys can compare over the telephone.
func (d *Draft) Words() ([]string, error) {
	h, p, err := d.open()
	if err != nil {
		return nil, err
	}
	var out []string
	say := func(format string, args ...any) { out = append(out, oneLine(fmt.Sprintf(format, args...))) }
	for _, part := range d.Parts {
		if part.Role == metadata.ROOT {
			was, is := h.root.Signed, p.root.Signed
			say("root: version %d becomes %d, expires %s", was.Version, is.Version, day(is.Expires))
			for _, role := range []string{metadata.ROOT, metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP} {
				keyWords(say, role, rootGroup(h.root, role), rootGroup(p.root, role), is.Keys)
			}
		} else {
			listWords(say, part.Role, h, p)
		}
		say("    digest of what is signed: %s", digest(canonical(part)))
	}
	return out, nil
}

// oneLine keeps what others named in its line: who prepares a draft must not
// write lines of their own for a person to read.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}

func listWords(say func(string, ...any), role string, h have, p proposal) {
	l := p.lists[role]
	was := h.lists[role].meta
	version := int64(0)
	if was != nil {
		version = was.Signed.Version
	}
	say("%s: version %d becomes %d, expires %s", role, version, l.Signed.Version, day(l.Signed.Expires))
	var before map[string]*metadata.TargetFiles
	if was != nil {
		before = was.Signed.Targets
	}
	// All of it, and not only what differs: who prepared the draft also wrote
	// down what it differs from.
	for _, name := range slices.Sorted(maps.Keys(l.Signed.Targets)) {
		verb, is, old := "lists", l.Signed.Targets[name], before[name]
		switch {
		case was == nil: // the list in force is not in the draft
		case old == nil:
			verb = "NEW  "
		case !bytes.Equal(old.Hashes["sha256"], is.Hashes["sha256"]) || old.Length != is.Length:
			verb = "OTHER"
		}
		say("    %s %s (%d bytes, sha256 %x)", verb, name, is.Length, []byte(is.Hashes["sha256"]))
	}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if _, there := l.Signed.Targets[name]; !there {
			say("    GONE  %s", name)
		}
	}
	say("    %d files in all", len(l.Signed.Targets))
	if role != metadata.TARGETS {
		return
	}
	for _, r := range delegations(l) {
		keyWords(say, r.Name, releaseGroup(was, r.Name), releaseGroup(l, r.Name), l.Signed.Delegations.Keys)
		say("        for %v, terminating: %t", r.Paths, r.Terminating)
	}
	for _, r := range delegations(was) {
		if releaseGroup(l, r.Name).ids == nil {
			say("    role %s ENDS", r.Name)
		}
	}
}

func keyWords(say func(string, ...any), role string, was, is group, keys map[string]*metadata.Key) {
	say("    %s: %d of %d keys must sign", role, is.threshold, len(is.ids))
	for _, id := range is.ids {
		mark, kind := "   ", "?"
		if !slices.Contains(was.ids, id) {
			mark = "NEW"
		}
		if k := keys[id]; k != nil {
			kind = k.Type
		}
		say("    %s %.16s %s", mark, id, kind)
	}
	for _, id := range was.ids {
		if !slices.Contains(is.ids, id) {
			say("    OUT %.16s", id)
		}
	}
	if was.threshold != 0 && was.threshold != is.threshold {
		say("        the threshold WAS %d", was.threshold)
	}
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }

// canonical is the part without its signatures.
func canonical(p Part) []byte {
	if p.Role == metadata.ROOT {
		if m, err := metadata.Root().FromBytes(p.Metadata); err == nil {
			m.ClearSignatures()
			b, _ := m.ToBytes(false) // read from JSON a moment ago
			return b
		}
		return nil
	}
	m, err := metadata.Targets().FromBytes(p.Metadata)
	if err != nil {
		return nil
	}
	m.ClearSignatures()
	b, _ := m.ToBytes(false) // as above
	return b
}
