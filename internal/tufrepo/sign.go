// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// maxMetadata limits one metadata file, in bytes. It is go-tuf's own limit for
// targets, about 10,000 of them.
const maxMetadata = 5_000_000

// have is what a client accepts now: what timestamp.json leads to. All but the
// root are nil before the first publication.
type have struct {
	root          *metadata.Metadata[metadata.RootType]
	timestamp     *metadata.Metadata[metadata.TimestampType]
	snapshot      *metadata.Metadata[metadata.SnapshotType]
	targets       *metadata.Metadata[metadata.TargetsType]
	snapshotBytes []byte
	targetsBytes  []byte
}

func (d disk) load() (have, error) {
	var h have
	versions, err := d.versions(metadata.ROOT)
	if err != nil {
		return h, err
	}
	if len(versions) == 0 {
		return h, fault.New(fault.NotFound, "repository_missing", "repository %s has no root", d.dir).
			WithHint("make it first: klatch-forge init")
	}
	newest := versions[0]
	for _, v := range versions {
		newest = max(newest, v)
	}
	b, err := durable.ReadFile(d.metadata(fmt.Sprintf("%d.root.json", newest)), maxMetadata)
	if err != nil {
		return h, err
	}
	if h.root, err = metadata.Root().FromBytes(b); err != nil {
		return h, fmt.Errorf("read root %d of %s: %w", newest, d.dir, err)
	}
	b, err = durable.ReadFile(d.metadata("timestamp.json"), maxMetadata)
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
	if meta = h.snapshot.Signed.Meta["targets.json"]; meta == nil {
		return h, fmt.Errorf("read snapshot of %s: it names no targets", d.dir)
	}
	if h.targetsBytes, err = durable.ReadFile(d.metadata(fmt.Sprintf("%d.targets.json", meta.Version)), maxMetadata); err != nil {
		return h, err
	}
	if h.targets, err = metadata.Targets().FromBytes(h.targetsBytes); err != nil {
		return h, fmt.Errorf("read targets %d of %s: %w", meta.Version, d.dir, err)
	}
	return h, nil
}

func (h have) targetsExpires() time.Time {
	if h.targets == nil {
		return time.Time{}
	}
	return h.targets.Signed.Expires
}

func (h have) targetsVersion() int64 {
	if h.targets == nil {
		return 0
	}
	return h.targets.Signed.Version
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
	for _, v := range vs {
		current = max(current, v)
	}
	return current + 1, nil
}

func writeVersioned[T metadata.Roles](d disk, m *metadata.Metadata[T], root *metadata.Metadata[metadata.RootType], role string, keys Role) ([]byte, error) {
	b, err := sign(m, root, role, keys)
	if err != nil {
		return nil, err
	}
	return b, d.write(d.metadata(fmt.Sprintf("%d.%s.json", version(m), role)), b, 0o644)
}

func version(m any) int64 {
	switch m := m.(type) {
	case *metadata.Metadata[metadata.TargetsType]:
		return m.Signed.Version
	case *metadata.Metadata[metadata.SnapshotType]:
		return m.Signed.Version
	}
	return 0
}

// sign signs with every signer of the role and then asks, as a client would,
// whether that is enough. Nothing that a client refuses is written.
func sign[T metadata.Roles](m *metadata.Metadata[T], root *metadata.Metadata[metadata.RootType], role string, keys Role) ([]byte, error) {
	m.ClearSignatures()
	for _, s := range keys.Signers {
		if _, err := m.Sign(adapter{s}); err != nil {
			return nil, fmt.Errorf("sign %s: %w", role, err)
		}
	}
	if err := root.VerifyDelegate(role, m); err != nil {
		return nil, fault.New(fault.Untrusted, "keys_not_in_root", "sign %s: clients would refuse the result: %w", role, err).
			WithHint("use the keys that root %d names for %s", root.Signed.Version, role)
	}
	b, err := m.ToBytes(false)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", role, err)
	}
	return append(b, '\n'), nil
}

// adapter makes a sigstore signer, which go-tuf wants, of a crypto.Signer,
// which key files and tokens give.
type adapter struct{ crypto.Signer }

// PublicKey gives the public half.
func (a adapter) PublicKey(...signature.PublicKeyOption) (crypto.PublicKey, error) {
	return a.Public(), nil
}

// SignMessage signs the bytes themselves with Ed25519, their SHA-256 with
// anything else.
func (a adapter) SignMessage(message io.Reader, _ ...signature.SignOption) ([]byte, error) {
	b, err := io.ReadAll(message)
	if err != nil {
		return nil, err
	}
	if _, ok := a.Public().(ed25519.PublicKey); ok {
		return a.Sign(rand.Reader, b, crypto.Hash(0))
	}
	sum := sha256.Sum256(b)
	return a.Sign(rand.Reader, sum[:], crypto.SHA256)
}

func describe(b []byte, version int64) *metadata.MetaFiles {
	sum := sha256.Sum256(b)
	m := metadata.MetaFile(version)
	m.Length = int64(len(b))
	m.Hashes = metadata.Hashes{"sha256": sum[:]}
	return m
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// expiry is in whole seconds, the precision of the metadata.
func expiry(now time.Time, life time.Duration) time.Time {
	return now.UTC().Add(life).Truncate(time.Second)
}

func halfGone(expires time.Time, life time.Duration, now time.Time) bool {
	return expires.Sub(now) < life/2
}

func sameJSON(a, b *json.RawMessage) bool {
	if a == nil || b == nil {
		return a == b
	}
	var x, y bytes.Buffer
	return json.Compact(&x, *a) == nil && json.Compact(&y, *b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}
