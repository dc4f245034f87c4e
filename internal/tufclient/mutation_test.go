// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"crypto/sha512"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufrepo"
)

// Each of these holds a check that no other test missed when it was taken out
// (docs/explanation/mutation-check.md).

// TestSignedListsThatAreRefused: two of three holders of the targets keys sign
// something that is well-formed TUF and still not for us.
func TestSignedListsThatAreRefused(t *testing.T) {
	for name, change := range map[string]func(map[string]*metadata.TargetFiles){
		"a path that leaves the folder": func(m map[string]*metadata.TargetFiles) { m["debian-12/../../x.lpb"] = m[firstPath] },
		"an absolute path":              func(m map[string]*metadata.TargetFiles) { m["/etc/passwd"] = m[firstPath] },
		"a path with a line end":        func(m map[string]*metadata.TargetFiles) { m["a\nb"] = m[firstPath] },
		"a hidden file":                 func(m map[string]*metadata.TargetFiles) { m["debian-12/.ssh/x"] = m[firstPath] },
		"two digests": func(m map[string]*metadata.TargetFiles) {
			sum := sha512.Sum512([]byte("klatch_1"))
			m[firstPath].Hashes["sha512"] = sum[:]
		},
		"another digest": func(m map[string]*metadata.TargetFiles) {
			sum := sha512.Sum512([]byte("klatch_1"))
			m[firstPath].Hashes = metadata.Hashes{"sha512": sum[:]}
		},
		"no digest": func(m map[string]*metadata.TargetFiles) { m[firstPath].Hashes = nil },
	} {
		t.Run(name, func(t *testing.T) {
			r := tufsim.New(t, "a", start)
			r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("klatch_1")})
			c := newClient(t, r)
			was := c.mustRefresh(start)
			next := was.TargetsVersion + 1
			from := was.Files()
			tufsim.Forge(r, "metadata/"+from[len(from)-3].Name, "metadata/9.targets.json", r.Keys.Targets.Signers[:2], func(m *metadata.TargetsType) {
				m.Version = 9
				change(m.Targets)
			})
			tufsim.Forge(r, "metadata/"+from[len(from)-2].Name, "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
				m.Version = 9
				m.Meta["targets.json"] = &metadata.MetaFiles{Version: 9}
			})
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version = 9
				m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 9}
			})
			if s, err := c.refresh(start.Add(time.Hour)); fault.CodeOf(err) != "metadata_malformed" {
				t.Errorf("accepted after version %d: %+v, %v", next, s, err)
			}
		})
	}
}

// A new anchor is the owner's word about whom to believe, not about the time:
// with it an old, expired world must not come back.
func TestANewAnchorDoesNotTurnTheClockBack(t *testing.T) {
	r, other := tufsim.New(t, "a", start), tufsim.New(t, "b", start)
	c := newClient(t, r)
	r.Publish(start.Add(time.Hour), tufrepo.Target{Path: firstPath, Content: []byte("klatch_1")})
	c.mustRefresh(start.Add(time.Hour))
	c.cfg.Root, c.cfg.BaseURL = other.Root, other.Serve()
	if _, err := c.refresh(start); fault.CodeOf(err) != "clock_back" && err == nil {
		t.Error("the clock went back with a new anchor")
	}
	if _, err := c.refresh(start.Add(10 * time.Minute)); fault.CodeOf(err) != "clock_back" {
		t.Errorf("the second look: %v", err)
	}
}
