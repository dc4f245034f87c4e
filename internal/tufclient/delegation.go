// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Limits of the tree of roles. A list holds about 10,000 targets in maxList
// bytes, go-tuf's own limit for the top list.
const (
	maxRoles = 32
	maxList  = 5_000_000
)

// roleName keeps a role's name from being a path, or the name of another file
// of our memory.
var roleName = regexp.MustCompile(`^[a-z][a-z0-9.]*-[a-z0-9.-]*[a-z0-9]$`)

var segment = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z.+~_-]{0,127}$`)

// releaseRole is one delegation that was found to be of the only form we
// follow.
type releaseRole struct {
	name    string
	pattern []string
}

// matches says whether a target's path is the role's own. A star stands for
// one whole part, as the TUF specification reads it (section 4.5).
func (r releaseRole) matches(name string) bool {
	parts := strings.Split(name, "/")
	if len(parts) != len(r.pattern) {
		return false
	}
	for i, p := range r.pattern {
		if p != "*" && p != parts[i] {
			return false
		}
	}
	return true
}

func (r releaseRole) overlaps(o releaseRole) bool {
	for i, p := range r.pattern {
		if q := o.pattern[i]; p != q && p != "*" && q != "*" {
			return false
		}
	}
	return true
}

// roles checks the shape of the delegations: one level, unique names, each
// terminating, each with one pattern DISTRO/ARCH/x/y that overlaps no other.
// So each role has one parent and each path one role, and the order in which
// they are asked cannot matter (go-tuf does not check a role again that it
// meets under a second parent).
func roles(d *metadata.Delegations) ([]releaseRole, error) {
	if d == nil {
		return nil, nil
	}
	bad := func(format string, args ...any) ([]releaseRole, error) {
		return nil, fault.New(fault.Untrusted, codeDelegation, "delegations of targets: "+format, args...)
	}
	if d.SuccinctRoles != nil || len(d.Roles) > maxRoles {
		return bad("%d roles, or hash bins; at most %d roles with a pattern are followed", len(d.Roles), maxRoles)
	}
	var out []releaseRole
	for _, r := range d.Roles {
		if len(r.Name) > 64 || !roleName.MatchString(r.Name) {
			return bad("%.80q cannot name a role", r.Name)
		}
		if !r.Terminating || len(r.PathHashPrefixes) > 0 || len(r.Paths) != 1 {
			return bad("role %s is not terminating with exactly one pattern", r.Name)
		}
		one := releaseRole{r.Name, strings.Split(r.Paths[0], "/")}
		if len(one.pattern) != 4 || one.pattern[3] != "*" || !segment.MatchString(one.pattern[0]) ||
			!segment.MatchString(one.pattern[1]) || one.pattern[2] != "*" && !segment.MatchString(one.pattern[2]) {
			return bad("pattern %.160q of role %s is not DISTRO/ARCH/RELEASE/*", r.Paths[0], r.Name)
		}
		for _, o := range out {
			if o.name == one.name || o.overlaps(one) {
				return bad("roles %s and %s are two for the same paths", o.name, one.name)
			}
		}
		out = append(out, one)
	}
	return out, nil
}

// tree is the verified metadata that release roles are added to, one after the
// other, when somebody asks for them.
type tree struct {
	cfg     Config
	trusted trustedmetadata.TrustedMetadata
	fetch   *fetcher
	write   func(string, []byte, fs.FileMode) error
	roles   []releaseRole
}

// load verifies a role's list and returns its targets: those under its own
// pattern. What else it lists does not count, as in every TUF client.
func (t *tree) load(r releaseRole) (own []Target, err error) {
	defer func() { // as in update
		if p := recover(); p != nil {
			own, err = nil, fault.New(fault.Untrusted, codeMalformed, "metadata of role %s lacks a member: %v", r.name, p)
		}
	}()
	meta := t.trusted.Snapshot.Signed.Meta[r.name+".json"]
	if meta == nil {
		return nil, fault.New(fault.Untrusted, codeUntrusted, "role %s is delegated to, but not in the snapshot", r.name)
	}
	b, kept, err := t.read(r, meta)
	if err != nil {
		return nil, err
	}
	m, err := t.trusted.UpdateDelegatedTargets(b, r.name, metadata.TARGETS)
	if err != nil {
		return nil, explain(err)
	}
	if err := checkForm(t.cfg.Dir, r.name+".json", b); err != nil {
		return nil, err
	}
	if m.Signed.Delegations != nil {
		return nil, fault.New(fault.Untrusted, codeDelegation, "role %s delegates further; only targets may", r.name)
	}
	for name, f := range m.Signed.Targets {
		if !r.matches(name) {
			continue
		}
		one, err := target(name, f, m.Signed.Expires)
		if err != nil {
			return nil, err
		}
		one.Role = r.name
		own = append(own, one)
	}
	if !kept {
		err = t.write(filepath.Join(t.cfg.Dir, r.name+".json"), b, 0o600)
	}
	return own, err
}

// read takes a role's list from the memory if it is the one that the snapshot
// names, else from the network.
func (t *tree) read(r releaseRole, meta *metadata.MetaFiles) (b []byte, kept bool, err error) {
	b, err = durable.ReadFile(filepath.Join(t.cfg.Dir, r.name+".json"), maxState)
	if err == nil && len(meta.Hashes) > 0 && meta.VerifyLengthHashes(b) == nil {
		return b, true, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
	limit := int64(maxList)
	if meta.Length > 0 {
		limit = min(limit, meta.Length)
	}
	b, err = t.fetch.DownloadFile(t.cfg.BaseURL+"/metadata/"+fmt.Sprintf("%d.%s.json", meta.Version, r.name), limit, 0)
	if err != nil {
		return nil, false, explain(err)
	}
	return b, false, nil
}

// target reads one line of a signed list.
func target(name string, f *metadata.TargetFiles, until time.Time) (Target, error) {
	parts := strings.Split(name, "/")
	if len(name) > 512 || slices.ContainsFunc(parts, func(p string) bool { return !segment.MatchString(p) }) {
		return Target{}, fault.New(fault.Untrusted, codeMalformed, "target path %.160q is not allowed", name)
	}
	if f == nil || f.Length < 0 || len(f.Hashes) != 1 || len(f.Hashes["sha256"]) != sha256.Size {
		return Target{}, fault.New(fault.Untrusted, codeMalformed, "target %s has no length or not exactly one SHA-256", name)
	}
	t := Target{Path: path.Clean(name), Role: metadata.TARGETS, Bytes: f.Length, SHA256: hex.EncodeToString(f.Hashes["sha256"]), Until: until}
	if f.Custom != nil {
		t.Custom = *f.Custom
	}
	return t, nil
}
