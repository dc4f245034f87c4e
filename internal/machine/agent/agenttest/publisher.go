// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"maps"
	"math/big"
	"path"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/cve"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/notice"
	"klatch/internal/rollout"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
	"klatch/internal/wire"
)

// Publisher makes livepatches and holds them in a repository in memory. It is
// an agent.Repository whose metadata is always good, unless Fail says not.
type Publisher struct {
	Anchor *trust.Anchor
	signer note.Signer
	t      testing.TB

	mu      sync.Mutex
	targets map[string][]byte
	static  map[string][]byte // files that no metadata names
	// Fail is the answer to the next refreshes.
	Fail error
	// Until is when its lists expire.
	Until time.Time
	// SignedAt is when the metadata says that it was signed.
	SignedAt time.Time
	fetched  map[string]int
	// Lost is a target that is signed and that the mirror does not have.
	Lost string
}

// NewPublisher makes a publisher with a lab key of its own.
func NewPublisher(t testing.TB) *Publisher {
	t.Helper()
	secret, public, err := note.GenerateKey(rand.Reader, "lab-1")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	// No module of these tests is signed; the anchor only needs a key of the
	// right form.
	modulus := new(big.Int).SetBit(big.NewInt(1), 2047, 1)
	a := trust.Anchor{
		Format: trust.AnchorFormat, Publisher: "lab", Profile: trust.Lab,
		Manifest:   trust.KeySet{Threshold: 1, Keys: []string{public}},
		ModuleKeys: []trust.ModuleKey{{Name: "lab", Issuer: []byte{0x30, 0}, Serial: []byte{2, 1, 1}, Modulus: modulus.Bytes(), Exponent: 65537}},
	}
	return &Publisher{Anchor: &a, signer: signer, t: t, targets: map[string][]byte{}, static: map[string][]byte{}, fetched: map[string]int{}}
}

// Livepatch builds one: its manifest and its bundle.
func (p *Publisher) Livepatch(k kernel.Build, s livepatch.Sequence, fixes ...cve.ID) (livepatch.Manifest, []byte) {
	p.t.Helper()
	module := bytes.Repeat(fmt.Appendf(nil, "module %d for %s\n", s, k), 50)
	short, long := sha256.Sum256(module), sha512.Sum512(module)
	m := livepatch.Manifest{
		Format: livepatch.ManifestFormat, Kernel: k, Sequence: s,
		Module: livepatch.Module{
			Name: s.ModuleName(), Bytes: int64(len(module)),
			SHA256: hex.EncodeToString(short[:]), SHA512: hex.EncodeToString(long[:]),
		},
		Functions: []livepatch.Function{{Object: "vmlinux", Name: "unix_ioctl"}},
	}
	for _, f := range fixes {
		m.Fixes = append(m.Fixes, livepatch.Fix{CVE: f, Check: livepatch.Passed})
	}
	signed, err := trustsign.Manifest(m, p.signer)
	if err != nil {
		p.t.Fatal(err)
	}
	return m, livepatch.Bundle{Manifest: signed, Module: module}.Encode()
}

// Publish puts a livepatch into the repository under its own name.
func (p *Publisher) Publish(k kernel.Build, s livepatch.Sequence, fixes ...cve.ID) (target string) {
	m, bundle := p.Livepatch(k, s, fixes...)
	p.Put(m.TargetPath(), bundle)
	return m.TargetPath()
}

// Put puts any bytes into the repository under any name.
func (p *Publisher) Put(target string, content []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.targets[target] = content
}

// Tell puts a notice on a kernel build into the repository.
func (p *Publisher) Tell(n notice.Notice) {
	p.t.Helper()
	n.Format = notice.Format
	b, err := n.Encode()
	if err != nil {
		p.t.Fatal(err)
	}
	p.Put(notice.TargetPath(n.Kernel), b)
}

// Withdraw takes a target out of the repository.
func (p *Publisher) Withdraw(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.targets, target)
}

// PutStatic puts a file into the repository that no metadata names; nil takes
// it away.
func (p *Publisher) PutStatic(name string, content []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.static[name] = content
}

// Static gets such a file.
func (p *Publisher) Static(_ context.Context, name string, _ int64) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.static[name]
	if b == nil {
		return nil, fault.New(fault.NotFound, "file_missing", "the server does not have %s", name)
	}
	return b, nil
}

// Fetches counts how often a target was fetched.
func (p *Publisher) Fetches(target string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fetched[target]
}

// Set changes how the repository behaves.
func (p *Publisher) Set(f func(*Publisher)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p)
}

// Refresh gives the repository as it is now.
func (p *Publisher) Refresh(context.Context, *trust.Anchor, time.Time) (agent.Snapshot, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.Fail != nil {
		return nil, p.Fail
	}
	return p, nil
}

// Recalls names the newest recalls that were put in.
func (p *Publisher) Recalls() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	newest := ""
	for t := range p.targets {
		if livepatch.RecallsVersion(t) > livepatch.RecallsVersion(newest) {
			newest = t
		}
	}
	return newest
}

// EvidencePolicy names the newest policy that was put in.
func (p *Publisher) EvidencePolicy() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return evidence.NewestPolicy(slices.Collect(maps.Keys(p.targets)))
}

// Beside lists what was put into one folder.
func (p *Publisher) Beside(target string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := slices.Collect(maps.Keys(p.targets))
	return slices.DeleteFunc(all, func(t string) bool { return path.Dir(t) != path.Dir(target) })
}

// Recall signs recalls and puts them in.
func (p *Publisher) Recall(r livepatch.Recalls) {
	p.t.Helper()
	signed, err := trustsign.Recalls(r, p.signer)
	if err != nil {
		p.t.Fatal(err)
	}
	p.Put(livepatch.RecallsPath(r.Version), signed)
}

// Named is a target by the signed list.
func (p *Publisher) Named(target string) (agent.Listed, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, ok := p.targets[target]
	if !ok {
		return agent.Listed{}, fault.New(fault.NotFound, "target_missing", "target %q is not in the signed list", target)
	}
	sum := sha256.Sum256(b)
	return agent.Listed{Target: rollout.Target{Path: target, Bytes: int64(len(b)), SHA256: hex.EncodeToString(sum[:])}, Until: p.Until}, nil
}

// Metadata says which state this is.
func (p *Publisher) Metadata() (v wire.Versions, signed time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return wire.Versions{Root: 1, Timestamp: 1, Snapshot: 1, Targets: int64(len(p.targets))}, p.SignedAt
}

// Fetch gets a target.
func (p *Publisher) Fetch(_ context.Context, target string, _ int64) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if target == p.Lost {
		return nil, fault.New(fault.Unavailable, "target_missing", "target %q is signed, but the server does not have it", target)
	}
	p.fetched[target]++
	b, ok := p.targets[target]
	if !ok {
		return nil, fault.New(fault.NotFound, "target_missing", "target %q is not in the signed list", target)
	}
	return b, nil
}
