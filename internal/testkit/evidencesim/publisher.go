// SPDX-License-Identifier: Apache-2.0

// Package evidencesim is a publisher with two built livepatches and all their
// evidence, and a forger who holds every key and signs whatever a test asks
// for. The forger makes envelopes by hand, not with package evidence. Tests
// only. Start with New.
package evidencesim

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sign"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

// Release is the kernel release of the livepatches.
const Release kernel.Release = "6.1.0-50-cloud-amd64"

// The signers. Bob is no author; alice wrote the source patches.
const (
	BuilderA = "builder-1"
	BuilderB = "builder-b"
	Tester   = "tester-1"
	Analyst  = "analyst-1"
	Bob      = "bob"
	Alice    = "alice"
	// Author is how the queue names alice.
	Author = "Alice Example <alice@example.org>"
)

// Publisher has a data folder of profile full, with two signed livepatches;
// nothing is published.
type Publisher struct {
	Dir   datadir.Dir
	Build build.Result // sequence 2
	t     testing.TB
}

// template is made once: the module key takes a while.
var template = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "klatch-evidencesim-")
	if err != nil {
		return "", err
	}
	made.Store(&dir)
	return dir, makeTemplate(dir, time.Now().Add(-time.Hour))
})

var made atomic.Pointer[string]

// New gives a test a publisher of its own.
func New(t testing.TB) *Publisher {
	t.Helper()
	from, err := template()
	check(t, err)
	dir := filepath.Join(t.TempDir(), "data")
	check(t, os.CopyFS(dir, os.DirFS(from)))
	d, err := datadir.Open(dir)
	check(t, err)
	all, err := build.Read(dir, Release)
	check(t, err)
	return &Publisher{Dir: d, Build: all[1], t: t}
}

// Remove takes the template away; TestMain calls it after the tests.
func Remove() {
	if dir := made.Load(); dir != nil {
		_ = os.RemoveAll(*dir)
	}
}

func makeTemplate(path string, at time.Time) error {
	d, err := datadir.Make(path, datadir.Policy{Publisher: "example.org", Profile: trust.Full})
	if err != nil {
		return err
	}
	if err := sign.MakeKeys(context.Background(), d, at); err != nil {
		return err
	}
	for _, k := range []struct {
		name string
		role evidence.Role
		also []string
	}{{BuilderB, evidence.Builder, nil}, {Bob, evidence.Reviewer, []string{"robert@example.org"}}, {Alice, evidence.Reviewer, nil}} {
		key, err := attest.MakeKey(d, k.name, k.role)
		if err != nil {
			return err
		}
		s := key.Signer()
		s.Also = k.also
		if _, err := attest.Allow(d, s); err != nil {
			return err
		}
	}
	for seq := livepatch.Sequence(1); seq <= 2; seq++ {
		b, p, err := Built(d, seq)
		if err != nil {
			return err
		}
		if err := Attested(d, b, p, at); err != nil {
			return err
		}
		if _, err := sign.Sign(d, b, at.Add(time.Minute)); err != nil {
			return err
		}
	}
	return nil
}

// Built puts a livepatch of any bytes into a data folder, with its plan.
func Built(d datadir.Dir, seq livepatch.Sequence) (build.Result, compose.Plan, error) {
	e := catalog.Entry{Release: Release, Distro: "debian-12", Arch: kernel.AMD64, BuildID: kernel.BuildID{7, 8, 9}, Series: "debian-6.1",
		Version: "6.1.176-1", Source: "linux-source-6.1", SourceV: "6.1.176-1", CC: "gcc-12", Compiler: "gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0",
		ConfigSHA256: hash("config"), Packages: map[string]string{"linux-image": "6.1.176-1 " + hash("image")}}
	if err := catalog.Save(d.Path, e); err != nil {
		return build.Result{}, compose.Plan{}, err
	}
	var patches []queue.Patch
	for i := range int(seq) {
		id := cve.ID(fmt.Sprintf("CVE-2026-000%d", i+1))
		diff := fmt.Appendf(nil, "--- a/net/f%d.c\n+++ b/net/f%d.c\n@@ -1,1 +1,1 @@\n-a\n+b\n", i, i)
		patches = append(patches, queue.Patch{Name: string(id), Fixes: []cve.ID{id}, Author: Author, Diff: diff, Files: []string{fmt.Sprintf("net/f%d.c", i)}})
	}
	plan, err := compose.New(e, patches, map[string]string{"create-diff-object": "0.9.10 " + hash("tool")}, seq)
	if err != nil {
		return build.Result{}, plan, err
	}
	digest, err := plan.Digest()
	if err != nil {
		return build.Result{}, plan, err
	}
	module := bytes.Repeat([]byte{byte(seq)}, 1000)
	dir := build.Dir(d.Path, Release, seq)
	b := build.Result{Version: 1, Result: build.Built, Kernel: e.Release, Distro: e.Distro, Arch: e.Arch, BuildID: e.BuildID, Sequence: seq, Plan: digest,
		Fixes: plan.Fixes(), Functions: []livepatch.Function{{Object: "vmlinux", Name: "f"}},
		Module: &build.Module{Path: seq.ModuleName() + ".ko", Bytes: int64(len(module)), SHA256: hash(string(module))}}
	b.Match.Checked, b.Match.Identical = 10, 10
	result, err := json.Marshal(b)
	if err != nil {
		return b, plan, err
	}
	record, err := plan.Encode()
	if err != nil {
		return b, plan, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return b, plan, err
	}
	for name, content := range map[string][]byte{b.Module.Path: module, "build.json": result, build.PlanFile: record} {
		if err := durable.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return b, plan, err
		}
	}
	b.Module.Path = filepath.Join(dir, b.Module.Path)
	return b, plan, nil
}

// Tested is the result of a test that passed: all base scenarios, and one for
// each earlier sequence.
func Tested(b build.Result) proof.Result {
	r := proof.Result{Version: 1, Verdict: lab.Pass, Sequence: b.Sequence, ModuleSHA256: b.Module.SHA256, Kernel: string(b.Kernel), BuildID: b.BuildID.String()}
	names := append([]string{"boot"}, evidence.BaseScenarios...)
	for s := livepatch.Sequence(1); s < b.Sequence; s++ {
		names = append(names, fmt.Sprintf("replace-sequence-%d", s))
	}
	for _, n := range names {
		r.Scenarios = append(r.Scenarios, proof.Scenario{Name: n, Verdict: lab.Pass})
	}
	for i, id := range b.Fixes {
		r.Fixes = append(r.Fixes, livepatch.Fix{CVE: id, Check: []livepatch.Check{livepatch.Passed, livepatch.Unchecked}[i%2]})
	}
	return r
}

// Attested puts all statements beside a build, with the keys in the folder:
// both builders', where there are two, and bob's review, where there is bob.
func Attested(d datadir.Dir, b build.Result, p compose.Plan, at time.Time) error {
	put := func(r evidence.Role, name string, e evidence.Envelope, err error) error {
		if err == nil {
			_, err = attest.Put(filepath.Dir(b.Module.Path), r, name, e)
		}
		return err
	}
	builders, err := attest.Keys(d, evidence.Builder)
	if err != nil {
		return err
	}
	for _, k := range builders {
		e, err := attest.Provenance(k, b, p, "test", at.Add(-time.Minute), at)
		if err := put(evidence.Builder, k.Name, e, err); err != nil {
			return err
		}
	}
	tester, err := attest.Key(d, evidence.Tester, "")
	if err != nil {
		return err
	}
	e, err := attest.Test(tester, b, Tested(b), at)
	if err := put(evidence.Tester, tester.Name, e, err); err != nil {
		return err
	}
	analyst, err := attest.Key(d, evidence.Analyst, "")
	if err != nil {
		return err
	}
	e, err = attest.VEX(analyst, b, nil, at)
	if err := put(evidence.Analyst, analyst.Name, e, err); err != nil {
		return err
	}
	bob, err := attest.Key(d, evidence.Reviewer, Bob)
	if fault.CodeOf(err) == "no_key" {
		return nil // no such person here
	}
	if err != nil {
		return err
	}
	e, err = attest.Review(bob, b, p, evidence.Approved, "", at)
	return put(evidence.Reviewer, Bob, e, err)
}

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// Key reads a private key of the folder, by its owner's name.
func (p *Publisher) Key(name string) ed25519.PrivateKey {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.Dir.Keys(), "evidence-"+name+".key"))
	check(p.t, err)
	block, _ := pem.Decode(b)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	check(p.t, err)
	k, ok := key.(ed25519.PrivateKey)
	if !ok {
		p.t.Fatalf("key of %s is %T", name, key)
	}
	return k
}

// KeyID is how an envelope names a key.
func KeyID(k ed25519.PrivateKey) string {
	return hash(string(k[ed25519.SeedSize:])) // the public half
}

// Envelope is a signed statement, made by hand.
func Envelope(payloadType, payload string, keys ...ed25519.PrivateKey) string {
	var sigs []string
	for _, k := range keys {
		sig := ed25519.Sign(k, fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(payloadType), payloadType, len(payload), payload))
		sigs = append(sigs, fmt.Sprintf(`{"keyid":%q,"sig":%q}`, KeyID(k), base64.StdEncoding.EncodeToString(sig)))
	}
	return fmt.Sprintf(`{"payloadType":%q,"payload":%q,"signatures":[%s]}`+"\n", payloadType, base64.StdEncoding.EncodeToString([]byte(payload)), strings.Join(sigs, ","))
}

// InToto is the payload type of statements.
const InToto = "application/vnd.in-toto+json"

// Payload is the text of a statement in an envelope.
func Payload(t testing.TB, envelope string) string {
	t.Helper()
	var e struct{ Payload []byte }
	check(t, json.Unmarshal([]byte(envelope), &e))
	return string(e.Payload)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
