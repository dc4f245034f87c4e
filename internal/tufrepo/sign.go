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
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
)

// KeyID is how TUF metadata names a public key: the SHA-256 of its canonical
// form (TUF specification 1.0, section 4.2).
func KeyID(public crypto.PublicKey) (string, error) {
	k, err := metadata.KeyFromPublicKey(public)
	if err != nil {
		return "", fault.New(fault.Invalid, "bad_key", "key of type %T cannot sign metadata", public).
			WithHint("use ECDSA P-256 or Ed25519")
	}
	return k.ID()
}

// bag is the private keys at hand, by key id. Which of them a role accepts is
// what its metadata says, not where the key lay.
type bag map[string]crypto.Signer

func newBag(keys Keys) (bag, error) {
	b := bag{}
	for _, r := range []Role{keys.Root, keys.Targets, keys.Release, keys.Snapshot, keys.Timestamp} {
		if err := b.add(r.Signers...); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b bag) add(signers ...crypto.Signer) error {
	for _, s := range signers {
		id, err := KeyID(s.Public())
		if err != nil {
			return err
		}
		b[id] = s
	}
	return nil
}

// group is a set of keys of which a threshold must sign.
type group struct {
	by        string // for people: "root 3", "role debian-12-amd64"
	ids       []string
	threshold int
}

func (g group) have(sigs []metadata.Signature) (n int) {
	for _, id := range g.ids {
		if slices.ContainsFunc(sigs, func(s metadata.Signature) bool { return s.KeyID == id }) {
			n++
		}
	}
	return n
}

// rootGroup is what a root says of one of the four top roles.
func rootGroup(root *rootMeta, role string) group {
	r := root.Signed.Roles[role]
	if r == nil {
		return group{by: fmt.Sprintf("root %d", root.Signed.Version)}
	}
	return group{fmt.Sprintf("root %d, keys of %s", root.Signed.Version, role), r.KeyIDs, r.Threshold}
}

func releaseGroup(top *listMeta, role string) group {
	for _, r := range delegations(top) {
		if r.Name == role {
			return group{"role " + role, r.KeyIDs, r.Threshold}
		}
	}
	return group{by: "role " + role}
}

// sign adds the signatures of all keys at hand that one of the groups names
// and that have not signed yet.
func sign[T metadata.Roles](m *metadata.Metadata[T], keys bag, groups ...group) error {
	for _, g := range groups {
		for _, id := range g.ids {
			s := keys[id]
			if s == nil || slices.ContainsFunc(m.Signatures, func(x metadata.Signature) bool { return x.KeyID == id }) {
				continue
			}
			if _, err := m.Sign(adapter{s}); err != nil {
				return fmt.Errorf("sign with key %.8s: %w", id, err)
			}
		}
	}
	return nil
}

// enough asks, as a client would, whether the signatures are enough. Nothing
// that a client refuses is written.
func enough[T metadata.Roles](root *rootMeta, role string, m *metadata.Metadata[T]) error {
	if err := root.VerifyDelegate(role, m); err != nil {
		return fault.New(fault.Untrusted, "keys_not_in_root", "sign %s: clients would refuse the result: %w", role, err).
			WithHint("use the keys that root %d names for %s", root.Signed.Version, role)
	}
	return nil
}

func encode[T metadata.Roles](m *metadata.Metadata[T]) ([]byte, error) {
	b, err := m.ToBytes(false)
	if err != nil {
		return nil, fmt.Errorf("encode metadata: %w", err)
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
