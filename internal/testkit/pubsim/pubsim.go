// SPDX-License-Identifier: Apache-2.0

// Package pubsim is a whole publisher for tests: keys of every sort, a trust
// anchor, and signed bundles in a TUF repository (package tufsim). The modules
// in its bundles are not kernel modules. Tests only.
package pubsim

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/cve"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// Publisher signs whatever a test asks for.
type Publisher struct {
	*tufsim.Repo
	Anchor *trust.Anchor
	Module *rsa.PrivateKey
	Note   note.Signer
	t      testing.TB
}

// rsaKey is made once: it takes a while.
var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// New makes a publisher of profile lab.
func New(t testing.TB, name string, now time.Time) *Publisher {
	t.Helper()
	key, err := rsaKey()
	check(t, err)
	skey, vkey, err := note.GenerateKey(rand.Reader, name+"-manifest")
	check(t, err)
	signer, err := note.NewSigner(skey)
	check(t, err)
	issuer, err := asn1.Marshal([]asn1.RawValue{})
	check(t, err)
	serial, err := asn1.Marshal(big.NewInt(4711))
	check(t, err)
	p := &Publisher{Repo: tufsim.New(t, name, now), Module: key, Note: signer, t: t}
	p.Anchor = &trust.Anchor{
		Publisher: name, Profile: trust.Lab, Root: p.Root,
		Manifest:   trust.KeySet{Threshold: 1, Keys: []string{vkey}},
		ModuleKeys: []trust.ModuleKey{{Name: "lab", Issuer: issuer, Serial: serial, Modulus: key.N.Bytes(), Exponent: key.E}},
	}
	return p
}

// Kernel is a kernel build; n makes different ones.
func Kernel(release string, n byte) kernel.Build {
	b := kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: kernel.Release(release)}
	for i := range b.ID {
		b.ID[i] = n + byte(i)*17
	}
	return b
}

// Bundle makes a signed bundle. Every second fix has a check that passed.
func (p *Publisher) Bundle(k kernel.Build, s livepatch.Sequence, fixes ...cve.ID) (livepatch.Manifest, livepatch.Bundle) {
	p.t.Helper()
	module, err := trustsign.Module(fmt.Appendf(nil, "module %d for %s", s, k.Release), p.Anchor.ModuleKeys[0], p.Module, rand.Reader)
	check(p.t, err)
	s256, s512 := sha256.Sum256(module), sha512.Sum512(module)
	m := livepatch.Manifest{
		Format: livepatch.ManifestFormat, Kernel: k, Sequence: s,
		Module:    livepatch.Module{Name: s.ModuleName(), Bytes: int64(len(module)), SHA256: hex.EncodeToString(s256[:]), SHA512: hex.EncodeToString(s512[:])},
		Functions: []livepatch.Function{{Object: "vmlinux", Name: "unix_stream_connect"}},
	}
	for i, id := range fixes {
		f := livepatch.Fix{CVE: id, Check: livepatch.Passed}
		if i%2 == 1 {
			f.Check = livepatch.Unchecked
		}
		m.Fixes = append(m.Fixes, f)
	}
	signed, err := trustsign.Manifest(m, p.Note)
	check(p.t, err)
	return m, livepatch.Bundle{Manifest: signed, Module: module}
}

// Release publishes a livepatch and returns its target path.
func (p *Publisher) Release(now time.Time, k kernel.Build, s livepatch.Sequence, fixes ...cve.ID) string {
	p.t.Helper()
	m, b := p.Bundle(k, s, fixes...)
	p.Publish(now, Listed(m, b, now))
	return m.TargetPath()
}

// Listed is a bundle with what a publisher's list says of it.
func Listed(m livepatch.Manifest, b livepatch.Bundle, released time.Time) tufrepo.Target {
	custom, err := json.Marshal(livepatch.Listed{Format: livepatch.ListedFormat, Kernel: m.Kernel, Sequence: m.Sequence, Fixes: m.Fixes, Released: released.UTC()})
	if err != nil {
		panic(err) // made of fixed types
	}
	return tufrepo.Target{Path: m.TargetPath(), Content: b.Encode(), Custom: custom}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
