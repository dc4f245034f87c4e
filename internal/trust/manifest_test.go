// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/testkit/signed"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

func TestManifestSignatures(t *testing.T) {
	p, err := signed.NewPublisher("ours")
	check(t, err)
	x, err := signed.NewPublisher("stranger")
	check(t, err)
	a := p.Anchor()
	m := signed.Manifest(kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}, 3, []byte("module"))
	sign := func(by ...note.Signer) []byte {
		b, err := trustsign.Manifest(m, by...)
		check(t, err)
		return b
	}
	two := sign(p.Signers[0], p.Signers[2])
	lines := strings.SplitAfter(string(two), "\n")
	broken := strings.Replace(lines[len(lines)-2], "AAAA", "BBBB", 1)
	if broken == lines[len(lines)-2] { // spoil the last letters before the padding
		l := []byte(broken)
		at, letter := len(l)-6, byte('A') // a letter of base64, whatever it was
		if l[at] == letter {
			letter = 'B'
		}
		l[at] = letter
		broken = string(l)
	}
	for _, tc := range []struct {
		name   string
		signed []byte
		code   fault.Code
	}{
		{"two of three", two, ""},
		{"the order does not matter", sign(p.Signers[2], p.Signers[1]), ""},
		{"all three", sign(p.Signers...), ""},
		{"unknown keys are ignored", sign(x.Signers[0], p.Signers[0], p.Signers[1], x.Signers[1]), ""},
		{"one below the threshold", sign(p.Signers[1]), "manifest_threshold"},
		{"one key twice", sign(p.Signers[1], p.Signers[1]), "manifest_threshold"},
		{"one of ours, one unknown", sign(p.Signers[1], x.Signers[1]), "manifest_threshold"},
		{"unknown keys only", sign(x.Signers...), "manifest_untrusted"},
		{"a bad signature by a known key beside good ones", []byte(strings.Join(lines[:len(lines)-2], "") + lines[len(lines)-2] + broken), ""},
		{"a bad signature by a known key", []byte(strings.Join(lines[:len(lines)-2], "") + broken), "manifest_untrusted"},
		{"text changed", bytes.Replace(two, []byte("unix_stream"), []byte("unix_dgram"), 1), "manifest_untrusted"},
		{"no signature", two[:bytes.Index(two, []byte("\n\n"))+1], "manifest_untrusted"},
		{"nothing", nil, "manifest_untrusted"},
		{"carriage returns", bytes.ReplaceAll(two, []byte("\n"), []byte("\r\n")), "manifest_untrusted"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := a.OpenManifest(tc.signed)
			if fault.CodeOf(err) != tc.code || (err == nil) != (tc.code == "") {
				t.Fatalf("got %v with code %q, want %q", err, fault.CodeOf(err), tc.code)
			}
			if err == nil && got.Sequence != 3 {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestAnchor(t *testing.T) {
	p, err := signed.NewPublisher("ours")
	check(t, err)
	for _, tc := range []struct {
		name   string
		change func(*trust.Anchor)
		code   fault.Code
	}{
		{"good", func(*trust.Anchor) {}, ""},
		{"lab keys", func(a *trust.Anchor) { a.Profile = trust.Lab }, "lab_keys"},
		{"unknown profile", func(a *trust.Anchor) { a.Profile = "loose" }, "anchor_malformed"},
		{"threshold 1 under small", func(a *trust.Anchor) { a.Manifest.Threshold = 1 }, "anchor_malformed"},
		{"threshold 0", func(a *trust.Anchor) { a.Manifest.Threshold = 0 }, "anchor_malformed"},
		{"threshold out of reach", func(a *trust.Anchor) { a.Manifest.Threshold = 4 }, "anchor_malformed"},
		{"one key twice", func(a *trust.Anchor) { a.Manifest.Keys[1] = a.Manifest.Keys[0] }, "anchor_malformed"},
		{"more keys than anybody has", func(a *trust.Anchor) {
			for n := range 33 {
				_, public, err := note.GenerateKey(nil, fmt.Sprint("k", n))
				check(t, err)
				a.Manifest.Keys = append(a.Manifest.Keys, public)
			}
		}, "anchor_malformed"},
		{"one key under two names", func(a *trust.Anchor) { a.Manifest.Keys[1] = renamed(t, a.Manifest.Keys[0], "another", "") }, "anchor_malformed"},
		{"one key under two names, one of them in two lines", func(a *trust.Anchor) {
			a.Manifest.Keys[1] = renamed(t, a.Manifest.Keys[0], "another", "\n")
		}, "anchor_malformed"},
		{"a key with a line end in it, as base64 allows", func(a *trust.Anchor) {
			a.Manifest.Keys[1] = a.Manifest.Keys[1][:len(a.Manifest.Keys[1])-4] + "\n" + a.Manifest.Keys[1][len(a.Manifest.Keys[1])-4:]
		}, "anchor_malformed"},
		{"a key with a line end after it", func(a *trust.Anchor) { a.Manifest.Keys[1] += "\r\n" }, "anchor_malformed"},
		{"a key whose hash has large letters", func(a *trust.Anchor) { a.Manifest.Keys[1] = largeHash(t) }, "anchor_malformed"},
		{"a module key with a zero before it", func(a *trust.Anchor) {
			a.ModuleKeys[0].Modulus = append([]byte{0}, a.ModuleKeys[0].Modulus...)
		}, "anchor_malformed"},
		{"bad key", func(a *trust.Anchor) { a.Manifest.Keys[1] = "x+00000000+AA==" }, "anchor_malformed"},
		{"no module key", func(a *trust.Anchor) { a.ModuleKeys = nil }, "anchor_malformed"},
		{"short module key", func(a *trust.Anchor) { a.ModuleKeys[0].Modulus = a.ModuleKeys[0].Modulus[:128] }, "anchor_malformed"},
		{"exponent 3", func(a *trust.Anchor) { a.ModuleKeys[0].Exponent = 3 }, "anchor_malformed"},
		{"no issuer", func(a *trust.Anchor) { a.ModuleKeys[0].Issuer = nil }, "anchor_malformed"},
		{"publisher with a path", func(a *trust.Anchor) { a.Publisher = "../x" }, "anchor_malformed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := p.Anchor()
			a.Manifest.Keys = append([]string(nil), a.Manifest.Keys...)
			a.ModuleKeys = append([]trust.ModuleKey(nil), a.ModuleKeys...)
			tc.change(&a)
			b, err := trustsign.Anchor(a)
			check(t, err)
			if _, err := trust.ParseAnchor(b, false); fault.CodeOf(err) != tc.code || (err == nil) != (tc.code == "") {
				t.Errorf("got %v with code %q, want %q", err, fault.CodeOf(err), tc.code)
			}
			if tc.code == "lab_keys" {
				if _, err := trust.ParseAnchor(b, true); err != nil {
					t.Errorf("allowed by the owner: %v", err)
				}
			}
		})
	}
	a, err := trustsign.Anchor(p.Anchor())
	check(t, err)
	for _, text := range []string{"", "{}", string(a) + "{}", strings.Replace(string(a), `"format"`, `"more":1,"format"`, 1),
		strings.Replace(string(a), trust.AnchorFormat, "klatch-trust/2", 1)} {
		if _, err := trust.ParseAnchor([]byte(text), true); fault.CodeOf(err) != "anchor_malformed" {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

// largeHash is a key whose hash is spelled in large letters: the same key to
// the decoder, other text to recalls.
func largeHash(t *testing.T) string {
	t.Helper()
	for {
		_, public, err := note.GenerateKey(nil, "large")
		check(t, err)
		parts := strings.SplitN(public, "+", 3)
		if large := strings.ToUpper(parts[1]); large != parts[1] {
			out := parts[0] + "+" + large + "+" + parts[2]
			if _, err := note.NewVerifier(out); err != nil {
				t.Fatalf("the decoder refuses it by itself: %v", err)
			}
			return out
		}
	}
}

// renamed gives the same public key under another name; after is put into the
// middle of its letters.
func renamed(t *testing.T, key, name, after string) string {
	t.Helper()
	letters := strings.SplitN(key, "+", 3)[2]
	b, err := base64.StdEncoding.DecodeString(letters)
	check(t, err)
	out, err := note.NewEd25519VerifierKey(name, b[1:])
	check(t, err)
	return strings.Replace(out, letters, letters[:20]+after+letters[20:], 1)
}

// Two keys of one name are one holder's until somebody says otherwise.
func TestKeysOfOneNameCountOnce(t *testing.T) {
	p, err := signed.NewPublisher("ours")
	check(t, err)
	var signers []note.Signer
	a := p.Anchor()
	a.Manifest.Keys = nil
	for range 2 {
		secret, public, err := note.GenerateKey(nil, "same")
		check(t, err)
		s, err := note.NewSigner(secret)
		check(t, err)
		signers, a.Manifest.Keys = append(signers, s), append(a.Manifest.Keys, public)
	}
	b, err := trustsign.Manifest(signed.Manifest(kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}, 3, []byte("module")), signers...)
	check(t, err)
	if _, err := a.OpenManifest(b); fault.CodeOf(err) != "manifest_threshold" {
		t.Errorf("got %v", err)
	}
}
