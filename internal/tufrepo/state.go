// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// maxMetadata limits one metadata file, in bytes. It is go-tuf's own limit for
// targets, about 10,000 of them.
const maxMetadata = 5_000_000

// Go-tuf's metadata, by our names.
type (
	rootMeta      = metadata.Metadata[metadata.RootType]
	listMeta      = metadata.Metadata[metadata.TargetsType]
	snapshotMeta  = metadata.Metadata[metadata.SnapshotType]
	timestampMeta = metadata.Metadata[metadata.TimestampType]
)

// list is one signed list of targets: the top role's, or a release role's.
type list struct {
	meta  *listMeta
	bytes []byte
}

// have is what a client accepts now: what timestamp.json leads to. All but the
// root are empty before the first publication. lists has the top role under
// "targets" and each release role under its name.
type have struct {
	root          *rootMeta
	rootBytes     []byte
	timestamp     *timestampMeta
	snapshot      *snapshotMeta
	snapshotBytes []byte
	lists         map[string]list
}

func (d disk) load() (have, error) {
	h := have{lists: map[string]list{}}
	versions, err := d.versions(metadata.ROOT)
	if err != nil {
		return h, err
	}
	if len(versions) == 0 {
		return h, fault.New(fault.NotFound, "repository_missing", "repository %s has no root", d.dir).
			WithHint("make it first: klatch-forge init")
	}
	newest := slices.Max(versions)
	if h.rootBytes, err = durable.ReadFile(d.metadata(fmt.Sprintf("%d.root.json", newest)), maxMetadata); err != nil {
		return h, err
	}
	if h.root, err = metadata.Root().FromBytes(h.rootBytes); err != nil {
		return h, fmt.Errorf("read root %d of %s: %w", newest, d.dir, err)
	}
	b, err := durable.ReadFile(d.metadata("timestamp.json"), maxMetadata)
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil
	}
	if err != nil {
		return h, err
	}
	if h.timestamp, err = metadata.Timestamp().FromBytes(b); err != nil {
		return h, fmt.Errorf("read timestamp of %s: %w", d.dir, err)
	}
	meta := h.timestamp.Signed.Meta["snapshot.json"]
	if meta == nil {
		return h, fmt.Errorf("read timestamp of %s: it names no snapshot", d.dir)
	}
	if h.snapshotBytes, err = durable.ReadFile(d.metadata(fmt.Sprintf("%d.snapshot.json", meta.Version)), maxMetadata); err != nil {
		return h, err
	}
	if h.snapshot, err = metadata.Snapshot().FromBytes(h.snapshotBytes); err != nil {
		return h, fmt.Errorf("read snapshot %d of %s: %w", meta.Version, d.dir, err)
	}
	return h, d.loadLists(h)
}

// loadLists reads the top list and those of the release roles it delegates to.
func (d disk) loadLists(h have) error {
	read := func(role string) error {
		meta := h.snapshot.Signed.Meta[role+".json"]
		if meta == nil {
			return fmt.Errorf("read snapshot of %s: it names no %s", d.dir, role)
		}
		b, err := durable.ReadFile(d.metadata(fmt.Sprintf("%d.%s.json", meta.Version, role)), maxMetadata)
		if err != nil {
			return err
		}
		m, err := metadata.Targets().FromBytes(b)
		if err != nil {
			return fmt.Errorf("read %s %d of %s: %w", role, meta.Version, d.dir, err)
		}
		h.lists[role] = list{m, b}
		return nil
	}
	if err := read(metadata.TARGETS); err != nil {
		return err
	}
	for _, r := range delegations(h.top()) {
		if err := read(r.Name); err != nil {
			return err
		}
	}
	return nil
}

// top is the top role's list; nil before the first publication.
func (h have) top() *listMeta { return h.lists[metadata.TARGETS].meta }

func delegations(top *listMeta) []metadata.DelegatedRole {
	if top == nil || top.Signed.Delegations == nil {
		return nil
	}
	return top.Signed.Delegations.Roles
}

func (h have) listVersion(role string) int64 {
	if l := h.lists[role]; l.meta != nil {
		return l.meta.Signed.Version
	}
	if h.snapshot != nil { // a role that was dropped keeps its count
		if m := h.snapshot.Signed.Meta[role+".json"]; m != nil {
			return m.Version
		}
	}
	return 0
}

func (h have) snapshotVersion() int64 {
	if h.snapshot == nil {
		return 0
	}
	return h.snapshot.Signed.Version
}

func (h have) timestampVersion() int64 {
	if h.timestamp == nil {
		return 0
	}
	return h.timestamp.Signed.Version
}

// versions lists the version numbers of a role's files in the folder, those
// that no timestamp names included.
func (d disk) versions(role string) ([]int64, error) {
	names, err := filepath.Glob(d.metadata("*." + role + ".json"))
	if err != nil {
		return nil, err
	}
	var vs []int64
	for _, n := range names {
		v, err := strconv.ParseInt(strings.TrimSuffix(filepath.Base(n), "."+role+".json"), 10, 64)
		if err == nil && v > 0 {
			vs = append(vs, v)
		}
	}
	return vs, nil
}

// nextVersion is one more than anything ever written, so that no name gets a
// second content, whatever a mirror has cached.
func (d disk) nextVersion(role string, current int64) (int64, error) {
	vs, err := d.versions(role)
	if err != nil {
		return 0, err
	}
	return max(slices.Max(append(vs, current))+1, d.least(role)), nil
}

// copyList is a new, unsigned list with the content of an old one, which may
// be missing.
func copyList(old *listMeta) *listMeta {
	m := metadata.Targets()
	if old != nil {
		maps.Copy(m.Signed.Targets, old.Signed.Targets)
		if d := old.Signed.Delegations; d != nil {
			m.Signed.Delegations = &metadata.Delegations{Keys: maps.Clone(d.Keys)}
			for _, r := range d.Roles {
				r.KeyIDs = slices.Clone(r.KeyIDs)
				m.Signed.Delegations.Roles = append(m.Signed.Delegations.Roles, r)
			}
		}
	}
	return m
}
