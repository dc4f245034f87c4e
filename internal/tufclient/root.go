// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// TrustedRoot is the version of the root that the next Refresh begins at: the
// one in the memory if it grew from this anchor, else the anchor's own. It
// changes nothing.
func TrustedRoot(dir string, anchor []byte) (int64, error) {
	root := anchor
	var m memory
	b, err := durable.ReadFile(filepath.Join(dir, "memory.json"), maxState)
	sum := sha256.Sum256(anchor)
	if err == nil && json.Unmarshal(b, &m) == nil && m.Anchor == hex.EncodeToString(sum[:]) {
		newer, err := durable.ReadFile(filepath.Join(dir, "root.json"), maxState)
		if err == nil {
			root = newer
		} else if !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	version, _, err := versionOf(root)
	if err != nil {
		return 0, fault.New(fault.Internal, "state_malformed", "read the trusted root: %w", err)
	}
	return version, nil
}
