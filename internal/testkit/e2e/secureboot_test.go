// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/efi"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/testkit"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

// What the kernel answers to a module, as a number of errno(3).
const (
	taken    = "0"
	locked   = "1"   // EPERM: lockdown alone
	exists   = "17"  // EEXIST
	rejected = "129" // EKEYREJECTED: enforcement
)

// signature is one module, by how it is signed, and what becomes of it on a
// locked down kernel that knows the publisher's key.
type signature struct {
	name   string
	make   func(raw []byte) []byte
	loader fault.Code // of ours
	kernel string     // its own answer, past the loader
	says   string     // in the kernel's log
}

func signatures(p *securePublisher, stranger *securePublisher) []signature {
	flipped := func(raw []byte) []byte {
		b := p.signModule(raw)
		b[len(raw)/2] ^= 1
		return b
	}
	return []signature{
		{"one bit flipped", flipped, "module_signature_bad", rejected, ""},
		{"unsigned", slices.Clone[[]byte], "module_unsigned", rejected, "unsigned module"},
		{"last byte cut", func(raw []byte) []byte { b := p.signModule(raw); return b[:len(b)-1] }, "module_unsigned", rejected, "unsigned module"},
		{"foreign key", stranger.signModule, "module_key_unknown", rejected, "unavailable key"},
		{"another library, with the certificate inside", p.lenient, "module_key_unknown", rejected, "unsupported crypto"},
		{"ECDSA P-384", func(raw []byte) []byte { return p.signFile(raw, "sha256", p.ecdsa, p.ecdsaCert) }, "module_key_unknown", rejected, ""},
	}
}

// TestAttack is group V: a stock kernel that firmware with keys of this test
// has started, so that it is locked down by itself. Each module has two
// answers, our loader's and the kernel's when the loader is passed by.
func TestAttack(t *testing.T) {
	testkit.Need(t, "ovmf", "sign-file", "openssl")
	m := everything(t)
	p, stranger := newSecurePublisher(t, "e2e", m), newSecurePublisher(t, "stranger", m)
	s := newServer(t, m)
	s.init(p.publisher)
	s.sync(p.Dir)
	s.start()
	boot := bootSigners(t, m.image.Kernel)
	secure := efi.Keys(stranger.cert, append(boot, p.cert, p.ecdsaCert)...)
	g := bootFrom(t, m, p.publisher, &lab.Firmware{Variables: secure})
	g.install(quick)
	g.enroll(s.fleet, s.token())
	story := &secureStory{story{g, m, p.publisher, s}, p}
	sub := func(name string, f func(t *testing.T)) {
		t.Run("V/"+name, func(t *testing.T) {
			g.t, p.t = t, t
			began := time.Now()
			f(t)
			t.Logf("%s: %.1f s", name, time.Since(began).Seconds())
		})
		g.t, p.t = t, t
	}

	sub("distribution's module", func(t *testing.T) {
		g.locked("integrity", bootkeys.On)
		if got := g.errno(g.sh("modinfo -n dummy")); got != taken {
			t.Errorf("the kernel answers %s to its distribution's module", got)
		}
	})
	sub("signed by us", func(*testing.T) {
		g.trusted(bootkeys.Trusted, "module_key_enrolled")
		story.offer(1)
		g.try("klatch", "check")
		g.confirmed(1)
		g.checks(false, true)
	})
	sub("signed by sign-file", func(t *testing.T) {
		raw, _ := m.module(t, 2)
		module := p.signFile(raw, "sha256", p.Module, p.cert)
		if !slices.Equal(module, p.signModule(raw)) {
			t.Error("sign-file signs otherwise than we do")
		}
		p.release(2, livepatch.Bundle{Manifest: p.manifest(p.build(), 2, module), Module: module})
		s.sync(p.Dir)
		g.try("klatch", "check")
		g.confirmed(2)
		g.checks(false, false)
		// 8192 would be a module whose signature was not verified.
		if got := g.sh("cat /proc/sys/kernel/tainted"); got != "36864" {
			t.Errorf("taint %s, want 36864: a livepatch, from outside the kernel's tree", got)
		}
	})
	sub("the same livepatch twice", func(t *testing.T) {
		b := p.livepatch(2)
		if got := g.give(b); got.Code != "sequence_same" {
			t.Errorf("code %q: %s", got.Code, got.Text)
		}
		if got := g.kernelSays(b.Module); got != exists {
			t.Errorf("the kernel answers %s", got)
		}
	})
	for _, a := range signatures(p, stranger) {
		sub(a.name, func(t *testing.T) { g.refuses(p, 3, a) })
	}
	sub("removed from db", func(t *testing.T) {
		g.reflash(efi.DB(boot...))
		got := g.after(back{"failed", 0, "failed", "kernel_key_rejected"})
		g.checks(true, true)
		if !strings.Contains(got.State.NextStep+got.State.Text, "key") {
			t.Errorf("told: %+v", got.State)
		}
		g.trusted(bootkeys.Refused, "module_key_missing")
		story.stays("module_key_missing")
		// Whoever passes klatchd by comes as far as the kernel.
		if got := g.give(p.livepatch(3)); got.Code != "kernel_key_rejected" {
			t.Errorf("code %q: %s", got.Code, got.Text)
		}
	})
	sub("revoked in dbx", func(t *testing.T) {
		g.reflash(efi.DB(append(boot, p.cert)...), efi.DBX(efi.SignatureList(p.cert), efi.RevokedCertificate(sha256.Sum256(p.parsed.RawTBSCertificate))))
		// The kernel of Debian 12 does not care: the loader puts back what was
		// confirmed, and the kernel takes it.
		g.after(back{outcome: "loaded", loaded: 2})
		g.confirmed(2)
		g.trusted(bootkeys.Refused, "module_key_revoked")
		story.stays("module_key_revoked")
		// The publisher's own word reaches root, and holds there.
		recalls, err := trustsign.Recalls(livepatch.Recalls{Format: livepatch.RecallsFormat, Version: 1, Issued: time.Now().UTC().Truncate(time.Second),
			Entries: []livepatch.Recall{}, Floors: []livepatch.Floor{}, Keys: []string{livepatch.KeyDigest(p.Anchor.ModuleKeys[0].Modulus)}}, p.Note)
		if err != nil {
			t.Fatal(err)
		}
		p.Publish(time.Now(), tufrepo.Target{Path: livepatch.RecallsPath(1), Content: recalls})
		s.sync(p.Dir)
		g.try("klatch", "check")
		g.until("recalls taken", func(s agent.Status) bool { return s.Loader != nil && s.Loader.Recalls == 1 })
		before := g.footprint()
		if got := g.give(p.livepatch(4)); got.Code != "module_key_unknown" {
			t.Errorf("code %q: %s", got.Code, got.Text)
		}
		if after := g.footprint(); after != before {
			t.Errorf("something changed:\n%s\n---\n%s", before, after)
		}
	})
	if err := g.Close(); err != nil { // the next machines want its memory
		t.Fatal(err)
	}
	byOtherWays(t, p, stranger)
}

// secureStory is a story whose publisher has a certificate.
type secureStory struct {
	story
	p *securePublisher
}

// stays: what is offered is not downloaded, nothing is tried, the server is
// told; nobody counts a failure.
func (s *secureStory) stays(code fault.Code) {
	s.t.Helper()
	s.pub.release(3, s.pub.livepatch(3))
	defer s.pub.withdraw(s.pub.target(3))
	s.server.sync(s.pub.Dir)
	before := s.footprint()
	s.try("klatch", "check")
	s.until("stays", func(st agent.Status) bool {
		return st.Check.Result == "current" && st.Check.Code == code && st.Check.At.After(time.Now().Add(-time.Minute))
	})
	if after := s.footprint(); after != before {
		s.t.Errorf("something changed:\n%s\n---\n%s", before, after)
	}
	if got := s.events(3); slices.Contains(got, wire.EventStaged) {
		s.t.Errorf("events of livepatch 3: %v", got)
	}
	if got := s.sh("ls /var/lib/klatch/staged"); strings.Contains(got, "klatch_3") {
		s.t.Errorf("staged: %s", got)
	}
	machines, err := s.server.client().Machines(s.t.Context())
	if err != nil || len(machines) != 1 {
		s.t.Fatalf("machines of the server: %d, %v", len(machines), err)
	}
	if m := machines[0]; m.Facts.KeyTrust != "refused" || m.Facts.SecureBoot != "on" {
		s.t.Errorf("the server knows %+v", m.Facts)
	}
}

// locked: the kernel is locked down as wanted, and klatchd knows.
func (g *machine) locked(lockdown string, secure bootkeys.Switch) {
	g.t.Helper()
	if got := g.sh("cat /sys/kernel/security/lockdown"); !strings.Contains(got, "["+lockdown+"]") {
		g.t.Errorf("lockdown %s", got)
	}
	if s := g.status(); s.Facts.Lockdown != lockdown || s.Facts.SecureBoot != string(secure) {
		g.t.Errorf("facts %+v", s.Facts)
	}
}

// trusted: what klatch status says of the publisher's key.
func (g *machine) trusted(word bootkeys.Word, code fault.Code) {
	g.t.Helper()
	s := g.until("verdict on the key", func(s agent.Status) bool { return s.ModuleKey != nil })
	if s.ModuleKey.Word != word || s.ModuleKey.Code != code || s.Facts.KeyTrust != string(word) {
		g.t.Errorf("module key: %+v, facts %+v; want %s, %s", s.ModuleKey, s.Facts, word, code)
	}
	if text := g.try("klatch", "status").Stdout; !strings.Contains(string(text), s.ModuleKey.Text) {
		g.t.Errorf("klatch status does not say so:\n%s", text)
	}
}

// errno is the kernel's own answer to a module, past the loader.
func (g *machine) errno(path string) string {
	g.t.Helper()
	return strings.TrimSpace(g.run(hostile, "errno", path))
}

func (g *machine) kernelSays(module []byte) string {
	g.t.Helper()
	g.put("/tmp/module.ko", module)
	return g.errno("/tmp/module.ko")
}

// refuses gives one module to the loader, with a manifest that agrees, and to
// the kernel without the loader.
func (g *machine) refuses(p *securePublisher, n livepatch.Sequence, a signature) {
	g.t.Helper()
	raw, _ := p.made.module(g.t, n)
	module := a.make(raw)
	before := g.footprint()
	if got := g.give(livepatch.Bundle{Manifest: p.manifest(p.build(), n, module), Module: module}); got.Code != a.loader {
		g.t.Errorf("code %q (%s), want %q", got.Code, got.Text, a.loader)
	}
	g.run("dmesg", "--clear")
	if got := g.kernelSays(module); got != a.kernel {
		g.t.Errorf("the kernel answers %s, want %s", got, a.kernel)
	}
	said := g.sh("dmesg | tail -5")
	g.t.Logf("kernel: %s", said)
	if a.says != "" && !strings.Contains(said, a.says) {
		g.t.Errorf("the kernel says %q, want %q", said, a.says)
	}
	if after := g.footprint(); after != before {
		g.t.Errorf("something changed:\n%s\n---\n%s", before, after)
	}
}

// reflash changes firmware variables as a person at the machine does, and
// restarts.
func (g *machine) reflash(changes ...efi.Variable) {
	g.t.Helper()
	g.Machine.(lab.Flasher).Flash(changes...)
	g.restart(g.Reboot)
}

// bootSigners are the certificates by which a distribution's kernel is signed.
func bootSigners(t *testing.T, image string) [][]byte {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	signers, err := efi.Signers(b)
	if err != nil || len(signers) == 0 {
		t.Fatal(fmt.Errorf("%d signers of %s: %w", len(signers), image, err))
	}
	return signers
}
