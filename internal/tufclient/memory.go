// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// memory is our own file beside the metadata.
type memory struct {
	Format string    `json:"format"`
	Anchor string    `json:"anchor"` // SHA-256 of Config.Root that the metadata grew from
	Time   time.Time `json:"time"`   // newest signed time that was accepted
}

const memoryFormat = "klatch-tufclient/1"

// files is the metadata in the memory, in the order in which it may be
// replaced: each is verified with those before it.
var files = []string{"root.json", "timestamp.json", "snapshot.json", "targets.json"}

// readMemory also notices a new anchor: the machine's owner has decided anew
// whom to believe, so the old metadata counts no longer.
func readMemory(cfg Config) (memory, error) {
	anchor := sha256.Sum256(cfg.Root)
	fresh := memory{Format: memoryFormat, Anchor: hex.EncodeToString(anchor[:])}
	b, err := durable.ReadFile(filepath.Join(cfg.Dir, "memory.json"), maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return fresh, err
	}
	var m memory
	if err := json.Unmarshal(b, &m); err != nil || m.Format != memoryFormat {
		return fresh, damaged(cfg.Dir, "memory.json", err)
	}
	if m.Anchor == fresh.Anchor {
		return m, nil
	}
	fresh.Time = m.Time
	old, err := filepath.Glob(filepath.Join(cfg.Dir, "*.json"))
	if err != nil {
		return fresh, err
	}
	for _, name := range old {
		if filepath.Base(name) == "memory.json" {
			continue
		}
		if err := durable.Remove(name); err != nil {
			return fresh, err
		}
	}
	return fresh, writeMemory(cfg, fresh, durable.WriteFile)
}

func writeMemory(cfg Config, m memory, write func(string, []byte, fs.FileMode) error) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return write(filepath.Join(cfg.Dir, "memory.json"), append(b, '\n'), 0o600)
}

func damaged(dir, name string, cause error) error {
	return fault.New(fault.Internal, "state_malformed", "read %s: not what was written there: %w", filepath.Join(dir, name), cause).
		WithHint("remove the folder %s; the next look begins at the trust anchor again", dir)
}

// stage copies the memory to where go-tuf may write without syncing. A file
// that does not parse would make go-tuf fail for ever, so it is named here.
func stage(cfg Config) (string, error) {
	left, err := filepath.Glob(filepath.Join(cfg.Dir, ".staging-*"))
	if err != nil {
		return "", err
	}
	for _, l := range left {
		if err := os.RemoveAll(l); err != nil {
			return "", err
		}
	}
	if err := durable.RemoveTemp(cfg.Dir); err != nil {
		return "", err
	}
	staging, err := os.MkdirTemp(cfg.Dir, ".staging-")
	if err != nil {
		return "", err
	}
	for _, name := range files {
		b, err := durable.ReadFile(filepath.Join(cfg.Dir, name), maxState)
		if errors.Is(err, fs.ErrNotExist) {
			if name != "root.json" {
				continue
			}
			b, err = cfg.Root, nil
		}
		if err != nil {
			return "", err
		}
		if !json.Valid(b) {
			return "", damaged(cfg.Dir, name, nil)
		}
		// The staging folder is thrown away; a torn file in it harms nobody.
		if err := os.WriteFile(filepath.Join(staging, name), b, 0o600); err != nil { //nolint:forbidigo // see above
			return "", err
		}
	}
	return staging, nil
}

// keep writes what changed back, each file whole and synced; first the roots
// that were walked, under their versions, for those who copy the repository.
func keep(dir, staging string, walked map[string][]byte, write func(string, []byte, fs.FileMode) error) error {
	put := func(name string, b []byte) error {
		old, err := durable.ReadFile(filepath.Join(dir, name), maxState)
		if err == nil && bytes.Equal(old, b) {
			return nil
		}
		return write(filepath.Join(dir, name), b, 0o600)
	}
	for _, name := range files {
		b, err := durable.ReadFile(filepath.Join(staging, name), maxState)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := checkForm(dir, name, b); err != nil {
			return err
		}
		if name == "root.json" {
			trusted, err := metadata.Root().FromBytes(b)
			if err != nil {
				return damaged(dir, name, err)
			}
			for v := trusted.Signed.Version; ; v-- {
				r, ok := walked[rootName(v)]
				if !ok && v == trusted.Signed.Version {
					r, ok = b, true
				}
				if !ok {
					break
				}
				if err := put(rootName(v), r); err != nil {
					return err
				}
			}
		}
		if err := put(name, b); err != nil {
			return err
		}
	}
	return nil
}

// checkForm refuses, of metadata that go-tuf has accepted, a version of the
// specification that is not ours (go-tuf does not look), and a version far
// above the one before. What follows in the order of the files is not kept
// either.
func checkForm(dir, name string, b []byte) error {
	was := int64(0)
	old, err := durable.ReadFile(filepath.Join(dir, name), maxState)
	if err == nil {
		was, _, err = versionOf(old)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	is, spec, err := versionOf(b)
	if err != nil || !strings.HasPrefix(spec, "1.") {
		return errors.Join(err, fault.New(fault.Untrusted, codeMalformed, "%s follows specification %.20q; this client knows 1", name, spec))
	}
	if is > was+maxJump {
		return fault.New(fault.Untrusted, codeJump, "%s goes from version %d to %d at once", name, was, is).
			WithHint("whoever holds the publisher's online keys signed this; the publisher must replace them: klatch-forge keys rotate snapshot timestamp")
	}
	return nil
}

func versionOf(b []byte) (version int64, spec string, err error) {
	var m struct {
		Signed struct {
			Version int64  `json:"version"`
			Spec    string `json:"spec_version"`
		} `json:"signed"`
	}
	err = json.Unmarshal(b, &m)
	return m.Signed.Version, m.Signed.Spec, err
}

func rootName(version int64) string { return fmt.Sprintf("%d.root.json", version) }

// File is one accepted metadata file under its public name.
type File struct {
	Name    string
	Content []byte
}

// accepted reads the metadata back in the order in which a copy must be
// written: timestamp.json last.
func accepted(dir string, s *Snapshot) ([]File, error) {
	var list []File
	for v := int64(1); v <= s.Root; v++ {
		b, err := durable.ReadFile(filepath.Join(dir, rootName(v)), maxState)
		if errors.Is(err, fs.ErrNotExist) {
			list = nil // the anchor begins later than at the first root
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, File{rootName(v), b})
	}
	type pair struct{ memory, public string }
	var pairs []pair
	for _, r := range s.tree.roles {
		pairs = append(pairs, pair{r.name + ".json", fmt.Sprintf("%d.%s.json", s.tree.trusted.Targets[r.name].Signed.Version, r.name)})
	}
	pairs = append(pairs, pair{"targets.json", fmt.Sprintf("%d.targets.json", s.TargetsVersion)},
		pair{"snapshot.json", fmt.Sprintf("%d.snapshot.json", s.Snapshot)}, pair{"timestamp.json", "timestamp.json"})
	for _, f := range pairs {
		b, err := durable.ReadFile(filepath.Join(dir, f.memory), maxState)
		if err != nil {
			return nil, err
		}
		list = append(list, File{f.public, b})
	}
	return list, nil
}

// Files is the accepted metadata, byte for byte, in the order in which a copy
// of the repository must be written. A lazy look has none.
func (s *Snapshot) Files() []File { return slices.Clone(s.files) }
