// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/audit"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

// verified is what evidence verify --json says of sequence 2.
func verified(t *testing.T, f *evidencesim.Forger, args ...string) (code fault.Code, exit int, text string) {
	t.Helper()
	stdout, stderr, exit := program(t, append([]string{"evidence", "verify", f.Dir.Repository(), "--anchor", f.Dir.Anchor(), "--json"}, args...)...)
	var says struct {
		Accepted bool
		Code     fault.Code
		Answer   audit.Answer
	}
	if err := json.Unmarshal([]byte(stdout), &says); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	for _, l := range says.Answer.Livepatches {
		if strings.HasSuffix(l.Target, "klatch_2.lpb") {
			says.Code = l.Code
			if l.Accepted == (l.Code != "") || !l.Accepted && l.Next == "" {
				t.Errorf("%s: accepted %v, code %q, next %q", l.Target, l.Accepted, l.Code, l.Next)
			}
		}
	}
	if says.Accepted != (exit == 0) {
		t.Errorf("accepted %v with exit status %d", says.Accepted, exit)
	}
	return says.Code, exit, stdout + stderr
}

// TestAttack is group A of the attack catalog, through the program itself: the
// signing gate refuses with code and next step and signs nothing, and a
// stranger refuses what was published past the gate with the publisher's own
// keys.
func TestAttack(t *testing.T) {
	for _, a := range evidencesim.Attacks {
		t.Run("A/"+a.Name, func(t *testing.T) {
			t.Parallel()
			f := evidencesim.NewForger(t)
			a.Spoil(f)
			f.Publish(f.Good())
			if code, exit, text := verified(t, f); code != a.Code || exit != 3 {
				t.Errorf("a stranger: code %q, exit status %d, want %q and 3\n%s", code, exit, a.Code, text)
			}

			for _, name := range []string{"bundle.lpb", "signed.ko", "evidence.json"} {
				if err := os.Remove(filepath.Join(filepath.Dir(f.Build.Module.Path), name)); err != nil {
					t.Fatal(err)
				}
			}
			f.Write()
			_, stderr, exit := program(t, "--dir", f.Dir.Path, "sign", "--kernel", string(evidencesim.Release))
			want := cmp.Or(a.Gate, a.Code)
			if !strings.Contains(stderr, "("+string(want)+")") || exit != 3 && a.Gate != "bad_evidence_policy" || exit == 0 {
				t.Errorf("the gate: exit status %d, want code %s\n%s", exit, want, stderr)
			}
			if a.Gate == "" && !strings.Contains(stderr, "hint: ") {
				t.Errorf("no next step: %s", stderr)
			}
			if _, err := os.Stat(sign.BundleFile(f.Dir, f.Build)); !os.IsNotExist(err) {
				t.Errorf("a bundle was written: %v", err)
			}
		})
	}
}

// TestAttackOnPublished is group A where there is no gate: what a forger can
// publish with the publisher's own keys besides statements.
func TestAttackOnPublished(t *testing.T) {
	for _, a := range []struct {
		name  string
		code  fault.Code
		spoil func(*testing.T, *evidencesim.Forger, *evidencesim.Published)
	}{
		{"no evidence", "no_evidence", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			p.Target("klatch_2.evidence.json").Path += "5"
		}},
		{"the evidence of another livepatch", "other_module", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			p.Target("klatch_2.evidence.json").Content = p.Target("klatch_1.evidence.json").Content
		}},
		{"no policy", "no_policy", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) { p.Targets = p.Targets[1:] }},
		{"bytes after the evidence", "evidence_malformed", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			e := p.Target("klatch_2.evidence.json")
			e.Content = append(bytes.Clone(e.Content), '\n')
		}},
		{"evidence of another form", "evidence_malformed", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			e := p.Target("klatch_2.evidence.json")
			e.Content = bytes.Replace(e.Content, []byte("klatch-evidence/1"), []byte("klatch-evidence/2"), 1)
		}},
		{"signed in the future", "from_the_future", func(t *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			e := p.Target("klatch_2.evidence.json")
			f, err := evidence.ParseFile(e.Content)
			if err != nil {
				t.Fatal(err)
			}
			f.Signed = f.Signed.Add(24 * time.Hour)
			if e.Content, err = f.Encode(); err != nil {
				t.Fatal(err)
			}
		}},
		{"a livepatch at another's path", "bundle_differs", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			p.Target("klatch_2.lpb").Content = p.Target("klatch_1.lpb").Content
		}},
		{"another module in the bundle", "bundle_differs", func(t *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			one, err := livepatch.ParseBundle(p.Target("klatch_1.lpb").Content)
			if err != nil {
				t.Fatal(err)
			}
			two, err := livepatch.ParseBundle(p.Target("klatch_2.lpb").Content)
			if err != nil {
				t.Fatal(err)
			}
			p.Target("klatch_2.lpb").Content = livepatch.Bundle{Manifest: two.Manifest, Module: one.Module}.Encode()
		}},
		{"a manifest that says a fix was shown", "fixes_differ", func(t *testing.T, f *evidencesim.Forger, p *evidencesim.Published) {
			resign(t, f, p, func(m *livepatch.Manifest) { m.Fixes[1].Check = livepatch.Passed })
		}},
		{"a manifest that names other functions", "functions_differ", func(t *testing.T, f *evidencesim.Forger, p *evidencesim.Published) {
			resign(t, f, p, func(m *livepatch.Manifest) { m.Functions[0].Name = "g" })
		}},
		{"a signer who was taken out of a newer policy", "unknown_signer", func(t *testing.T, f *evidencesim.Forger, p *evidencesim.Published) {
			next := f.Policy
			next.Version++
			next.Signers = slices.DeleteFunc(slices.Clone(next.Signers), func(s evidence.Signer) bool { return s.Name == evidencesim.BuilderB })
			content, err := next.Encode()
			if err != nil {
				t.Fatal(err)
			}
			p.Targets = append(p.Targets, p.Targets[0])
			p.Targets[0].Path, p.Targets[0].Content = next.TargetPath(), content
		}},
		{"a policy under a higher number", "policy_malformed", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			p.Targets[0].Path = "policy/evidence.9.json"
		}},
		{"a policy of another profile", "policy_malformed", func(_ *testing.T, _ *evidencesim.Forger, p *evidencesim.Published) {
			p.Targets[0].Content = bytes.Replace(p.Targets[0].Content, []byte(`"profile":"full"`), []byte(`"profile":"lab"`), 1)
		}},
	} {
		t.Run("Attack/A/"+a.name, func(t *testing.T) {
			t.Parallel()
			f := evidencesim.NewForger(t)
			p := f.Good()
			a.spoil(t, f, p)
			f.Publish(p)
			if code, exit, text := verified(t, f); code != a.code || exit != 3 {
				t.Errorf("code %q, exit status %d, want %q and 3\n%s", code, exit, a.code, text)
			}
		})
	}
}

// resign changes the manifest of sequence 2 and signs it with the publisher's
// manifest keys.
func resign(t *testing.T, f *evidencesim.Forger, p *evidencesim.Published, change func(*livepatch.Manifest)) {
	t.Helper()
	b, err := livepatch.ParseBundle(p.Target("klatch_2.lpb").Content)
	if err != nil {
		t.Fatal(err)
	}
	text, _, _ := bytes.Cut(b.Manifest, []byte("\n\n"))
	m, err := livepatch.ParseManifest(append(bytes.Clone(text), '\n'))
	if err != nil {
		t.Fatal(err)
	}
	change(&m)
	var signers []note.Signer
	for _, n := range []string{"manifest-1.key", "manifest-2.key"} {
		secret, err := os.ReadFile(filepath.Join(f.Dir.Keys(), n))
		if err != nil {
			t.Fatal(err)
		}
		s, err := note.NewSigner(strings.TrimSpace(string(secret)))
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, s)
	}
	if b.Manifest, err = trustsign.Manifest(m, signers...); err != nil {
		t.Fatal(err)
	}
	p.Target("klatch_2.lpb").Content = b.Encode()
}

// TestAttackWithoutKeys: whoever only holds the files, as a mirror does, cannot
// change evidence or policy.
func TestAttackWithoutKeys(t *testing.T) {
	for _, suffix := range []string{"*klatch_2.evidence.json", "*klatch_2.lpb", "*evidence.*.json"} {
		t.Run("Attack/A/changed file "+suffix, func(t *testing.T) {
			f := evidencesim.NewForger(t)
			f.Publish(f.Good())
			if code, exit, text := verified(t, f); code != "" || exit != 0 {
				t.Fatalf("good evidence: %q, %d\n%s", code, exit, text)
			}
			var files []string
			for _, dir := range []string{"policy", "debian-12/amd64/" + string(evidencesim.Release)} {
				found, err := filepath.Glob(filepath.Join(f.Dir.Repository(), "targets", dir, suffix))
				if err != nil {
					t.Fatal(err)
				}
				files = append(files, found...)
			}
			if len(files) == 0 {
				t.Fatal("no file")
			}
			b, err := os.ReadFile(files[0])
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(files[0], b, 0o644); err != nil {
				t.Fatal(err)
			}
			if code, exit, text := verified(t, f); code != "target_digest" || exit != 3 {
				t.Errorf("code %q, exit status %d\n%s", code, exit, text)
			}
		})
	}
	t.Run("Attack/A/the anchor of somebody else", func(t *testing.T) {
		f := evidencesim.NewForger(t)
		f.Publish(f.Good())
		b, err := os.ReadFile(f.Dir.Anchor())
		if err != nil {
			t.Fatal(err)
		}
		var a trust.Anchor
		if err := json.Unmarshal(b, &a); err != nil {
			t.Fatal(err)
		}
		for i := range a.Manifest.Keys {
			if _, a.Manifest.Keys[i], err = note.GenerateKey(rand.Reader, "somebody"); err != nil {
				t.Fatal(err)
			}
		}
		if b, err = trustsign.Anchor(a); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f.Dir.Anchor(), b, 0o644); err != nil {
			t.Fatal(err)
		}
		if code, exit, text := verified(t, f); code != "manifest_untrusted" || exit != 3 {
			t.Errorf("code %q, exit status %d\n%s", code, exit, text)
		}
	})
}
