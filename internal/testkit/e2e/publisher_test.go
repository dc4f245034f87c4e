// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/testkit/signed"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// publisher signs real modules with test keys, and whatever else it is told.
type publisher struct {
	*pubsim.Publisher
	t    *testing.T
	made made
}

func newPublisher(t *testing.T, name string, m made) *publisher {
	t.Helper()
	p := &publisher{pubsim.New(t, name, time.Now()), t, m}
	p.Anchor.ModuleKeys[0].Issuer = signed.Issuer(name) // a real kernel wants a name with something in it
	p.Publish(time.Now())                               // an empty repository has metadata too
	return p
}

// build is the kernel that the livepatches are for.
func (p *publisher) build() kernel.Build {
	res := p.made.builds[1]
	return res.KernelBuild()
}

// signedModule is a module with its signature.
func (p *publisher) signedModule(n livepatch.Sequence) []byte {
	p.t.Helper()
	raw, _ := p.made.module(p.t, n)
	return p.signModule(raw)
}

func (p *publisher) signModule(raw []byte) []byte {
	p.t.Helper()
	b, err := trustsign.Module(raw, p.Anchor.ModuleKeys[0], p.Module, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// manifest describes a module as livepatch n for a kernel build, and signs.
func (p *publisher) manifest(k kernel.Build, n livepatch.Sequence, module []byte) []byte {
	p.t.Helper()
	_, res := p.made.module(p.t, n)
	s256, s512 := sha256.Sum256(module), sha512.Sum512(module)
	m := livepatch.Manifest{
		Format: livepatch.ManifestFormat, Kernel: k, Sequence: n, Functions: res.Functions,
		Module: livepatch.Module{Name: n.ModuleName(), Bytes: int64(len(module)), SHA256: hex.EncodeToString(s256[:]), SHA512: hex.EncodeToString(s512[:])},
	}
	for _, id := range res.Fixes {
		m.Fixes = append(m.Fixes, livepatch.Fix{CVE: id, Check: livepatch.Passed})
	}
	b, err := trustsign.Manifest(m, p.Note)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// livepatch is a good one.
func (p *publisher) livepatch(n livepatch.Sequence) livepatch.Bundle {
	module := p.signedModule(n)
	return livepatch.Bundle{Manifest: p.manifest(p.build(), n, module), Module: module}
}

// target is where a machine of our kernel looks for livepatch n.
func (p *publisher) target(n livepatch.Sequence) string {
	return livepatch.Manifest{Kernel: p.build(), Module: livepatch.Module{Name: n.ModuleName()}}.TargetPath()
}

// release publishes livepatch n, good or as given.
func (p *publisher) release(n livepatch.Sequence, b livepatch.Bundle) {
	p.t.Helper()
	p.Publish(time.Now(), tufrepo.Target{Path: p.target(n), Content: b.Encode()})
}

// withdraw stops offering a target, so that its name is free again.
func (p *publisher) withdraw(target string) {
	p.t.Helper()
	if _, err := tufrepo.Publish(p.t.Context(), p.Dir, tufrepo.Publication{Withdraw: []string{target}}, p.Keys, time.Now()); err != nil {
		p.t.Fatal(err)
	}
}

// stale is a timestamp that the publisher signed and that ran out.
func (p *publisher) stale() []byte {
	p.t.Helper()
	tufsim.Forge(p.Repo, "metadata/timestamp.json", "stale.json", p.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version++
		m.Expires = time.Now().Add(-time.Hour)
	})
	return p.Read("stale.json")
}
