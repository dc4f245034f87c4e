// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

const maxMetadata = 5_000_000 // bytes; go-tuf's own limit for targets

// LastMoment is the last second at which all metadata of a folder was fresh:
// a copy that somebody kept is checked as of then. Nothing is verified here;
// Repository verifies the same files at the time that this gives.
func LastMoment(dir string) (time.Time, error) {
	var first time.Time
	for _, pattern := range []string{"timestamp.json", "*.snapshot.json", "*.targets.json", "*.root.json"} {
		names, err := filepath.Glob(filepath.Join(dir, "metadata", pattern))
		if err != nil {
			return first, err
		}
		var newest int64
		var expires time.Time
		for _, n := range names {
			b, err := durable.ReadFile(n, maxMetadata)
			if err != nil {
				return first, err
			}
			var m struct {
				Signed struct {
					Version int64     `json:"version"`
					Expires time.Time `json:"expires"`
				} `json:"signed"`
			}
			if err := json.Unmarshal(b, &m); err != nil {
				return first, fmt.Errorf("read %s: %w", n, err)
			}
			if m.Signed.Version > newest {
				newest, expires = m.Signed.Version, m.Signed.Expires
			}
		}
		if newest == 0 {
			return first, fault.New(fault.NotFound, "source_missing", "%s holds no %s", filepath.Join(dir, "metadata"), pattern).
				WithHint("name the folder that holds metadata/ and targets/")
		}
		if first.IsZero() || expires.Before(first) {
			first = expires
		}
	}
	return first.Add(-time.Second), nil
}
