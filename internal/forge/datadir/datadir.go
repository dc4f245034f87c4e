// SPDX-License-Identifier: Apache-2.0

// Package datadir is the publisher's data folder: where each thing lies in it,
// and its policy. Catalog, queue and policy are reviewed text and belong in
// git; keys and outputs do not.
package datadir

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/trust"
)

// Policy is policy.toml.
type Policy struct {
	// Publisher names whose livepatches these are; it is part of every key's
	// name. Lower-case letters, digits, dots and dashes.
	Publisher string `toml:"publisher"`
	// Profile is lab, small or full; see docs/explanation/trust-on-the-machine.md.
	Profile trust.Profile `toml:"profile"`
}

// Thresholds says how many keys of each kind a profile makes and needs.
type Thresholds struct{ Keys, Need int }

// Rules of the profiles: root, targets, release and manifest keys. Snapshot and
// timestamp always have one key (security design, section 4.1).
var Rules = map[trust.Profile]map[string]Thresholds{
	trust.Lab:   {"root": {1, 1}, "targets": {1, 1}, "release": {1, 1}, "manifest": {1, 1}},
	trust.Small: {"root": {3, 2}, "targets": {2, 2}, "release": {2, 2}, "manifest": {2, 2}},
	trust.Full:  {"root": {5, 3}, "targets": {3, 2}, "release": {3, 2}, "manifest": {3, 2}},
}

// Dir is a publisher's data folder.
type Dir struct {
	Path   string
	Policy Policy
}

// Repository is the folder that is published.
func (d Dir) Repository() string { return filepath.Join(d.Path, "repository") }

// Keys is the folder of private keys.
func (d Dir) Keys() string { return filepath.Join(d.Path, "keys") }

// Pending is the folder of drafts that wait for signatures.
func (d Dir) Pending() string { return filepath.Join(d.Path, "pending") }

// Ceremonies is the folder of drafts that came into force: the record of who
// changed which keys when.
func (d Dir) Ceremonies() string { return filepath.Join(d.Path, "ceremonies") }

// Anchor is the file for machines and servers.
func (d Dir) Anchor() string { return filepath.Join(d.Path, "trust.json") }

var publisherPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

const policyFile = "policy.toml"

// Make writes a new data folder, or completes one that was begun with the
// same policy.
func Make(path string, p Policy) (Dir, error) {
	d := Dir{path, p}
	if !publisherPattern.MatchString(p.Publisher) {
		return d, fault.New(fault.Invalid, "bad_publisher", "%.80q cannot name a publisher", p.Publisher).
			WithHint("use lower-case letters, digits, dots and dashes: --publisher example.org")
	}
	if Rules[p.Profile] == nil {
		return d, fault.New(fault.Invalid, "bad_profile", "profile %.40q is unknown", p.Profile).WithHint("use lab, small or full")
	}
	for _, sub := range []string{"catalog", "queue"} {
		if err := os.MkdirAll(filepath.Join(path, sub), 0o755); err != nil {
			return d, err
		}
	}
	if err := os.MkdirAll(d.Keys(), 0o700); err != nil {
		return d, err
	}
	old, err := Open(path)
	switch {
	case err == nil && old.Policy != p:
		return d, fault.New(fault.Conflict, "policy_exists", "folder %s has publisher %s with profile %s already",
			path, old.Policy.Publisher, old.Policy.Profile)
	case err == nil:
		return d, nil
	case !errors.Is(err, fs.ErrNotExist):
		return d, err
	}
	b, err := toml.Marshal(p)
	if err != nil {
		return d, err
	}
	if err := durable.WriteFile(filepath.Join(path, ".gitignore"), []byte("/keys/\n/out/\n/repository/\n"), 0o644); err != nil {
		return d, err
	}
	return d, durable.WriteFile(filepath.Join(path, policyFile), b, 0o644)
}

// Open reads a data folder.
func Open(path string) (Dir, error) {
	d := Dir{Path: path}
	b, err := durable.ReadFile(filepath.Join(path, policyFile), 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return d, fault.New(fault.NotFound, "no_data_folder", "%s is not a publisher's data folder: %w", path, err).
			WithHint("make one: klatch-forge init %s --profile lab, or name it: --dir DIR", path)
	}
	if err != nil {
		return d, err
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&d.Policy); err != nil {
		return d, fault.New(fault.Invalid, "bad_policy", "read %s: %w", filepath.Join(path, policyFile), err)
	}
	if Rules[d.Policy.Profile] == nil || !publisherPattern.MatchString(d.Policy.Publisher) {
		return d, fault.New(fault.Invalid, "bad_policy", "read %s: publisher %q, profile %q", filepath.Join(path, policyFile), d.Policy.Publisher, d.Policy.Profile)
	}
	return d, nil
}

// CacheDir is where downloads, trees and images lie when nobody says
// otherwise: outside every repository, and open to the build user.
func CacheDir() (string, error) {
	if dir := os.Getenv("KLATCH_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Getuid() == 0 {
		return "/var/cache/klatch", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a cache folder: %w", err)
	}
	return filepath.Join(dir, "klatch"), nil
}
