// SPDX-License-Identifier: Apache-2.0

// Package trust verifies what the publisher says of a livepatch,
// without any metadata server: the manifest signature (a signed note, checked
// by klatchd and again by root) and the module signature (the kernel's own
// form, checked by root before the kernel checks it too).
//
// The parties: the publisher holds the private keys, in files or tokens, away
// from any fleet machine. A machine holds one anchor file, put there by its
// owner: the publisher's manifest keys with a threshold, the module keys and
// the first root of the metadata. A server holds nothing of this and can
// change nothing of it. How keys rotate: a new anchor is installed by the
// machine's owner; metadata keys rotate by themselves (package tufclient).
package trust

import (
	"bytes"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// AnchorFormat is the version word of the anchor file.
const AnchorFormat = "klatch-trust/1"

// MaxAnchor limits the anchor file, in bytes: a few keys and one TUF root.
const MaxAnchor = 1 << 20

// Profile says how strict a publisher's key handling is.
type Profile string

// The profiles. Lab keys lie in files on one machine; machines refuse them
// unless their owner allowed it.
const (
	Lab   Profile = "lab"
	Small Profile = "small"
	Full  Profile = "full"
)

// Anchor is what a machine believes before it reads anything from a network.
type Anchor struct {
	Format     string      `json:"format"`
	Publisher  string      `json:"publisher"`
	Profile    Profile     `json:"profile"`
	Manifest   KeySet      `json:"manifest"`
	ModuleKeys []ModuleKey `json:"module_keys"`
	Root       []byte      `json:"root"`                 // first root of the TUF repository; its own threshold is inside
	LogPolicy  string      `json:"log_policy,omitempty"` // C2SP tlog-policy, for klatchd (package translog); root does not read it
}

// KeySet is a threshold over note verifier keys
// (golang.org/x/mod/sumdb/note, "Verifying Notes").
type KeySet struct {
	Threshold int      `json:"threshold"`
	Keys      []string `json:"keys"`
}

// ModuleKey is the public half of a module signing key and how a module
// signature names it: issuer and serial number of its certificate, in DER.
type ModuleKey struct {
	Name     string `json:"name"`
	Issuer   []byte `json:"issuer"`
	Serial   []byte `json:"serial"`
	Modulus  []byte `json:"modulus"`
	Exponent int    `json:"exponent"`
}

var publisherName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

// ParseAnchor reads an anchor file and refuses one that promises less than its
// profile does. allowLab must have been said by the machine's owner.
func ParseAnchor(b []byte, allowLab bool) (*Anchor, error) {
	bad := func(format string, args ...any) (*Anchor, error) {
		return nil, fault.New(fault.Untrusted, "anchor_malformed", "trust anchor: "+format, args...)
	}
	if len(b) > MaxAnchor {
		return bad("%d bytes, limit %d", len(b), MaxAnchor)
	}
	var a Anchor
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		return bad("%w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) { // More takes a "}" for the end
		return bad("bytes after the end")
	}
	if a.Format != AnchorFormat {
		return bad("format %.40q, want %q", a.Format, AnchorFormat)
	}
	if !publisherName.MatchString(a.Publisher) {
		return bad("publisher %.80q is not a name", a.Publisher)
	}
	if _, err := a.Manifest.verifiers(); err != nil {
		return bad("%w", err)
	}
	if len(a.ModuleKeys) == 0 {
		return bad("no module key")
	}
	for _, k := range a.ModuleKeys {
		if _, err := k.publicKey(); err != nil {
			return bad("%w", err)
		}
	}
	switch a.Profile {
	case Small, Full:
		if a.Manifest.Threshold < 2 {
			return bad("profile %s needs a manifest threshold of 2 or more", a.Profile)
		}
	case Lab:
		if !allowLab {
			return nil, fault.New(fault.Untrusted, "lab_keys", "trust anchor of %s uses lab keys, which lie unprotected on one machine", a.Publisher).
				WithHint("install an anchor of profile small, or allow lab keys on this machine: klatch trust allow-lab")
		}
	default:
		return bad("profile %.40q is unknown", a.Profile)
	}
	return &a, nil
}

// Revoke takes recalled keys out. The threshold stands, also where no key is left to reach it.
func (a *Anchor) Revoke(r livepatch.Recalls) {
	a.Manifest.Keys = slices.DeleteFunc(a.Manifest.Keys, func(k string) bool { return r.Revokes([]byte(k)) })
	a.ModuleKeys = slices.DeleteFunc(a.ModuleKeys, func(k ModuleKey) bool { return r.Revokes(k.Modulus) })
}

// verifiers parses the keys; a threshold that the keys cannot reach, or one
// key under two names, is an error.
func (s KeySet) verifiers() ([]note.Verifier, error) {
	if s.Threshold < 1 || s.Threshold > len(s.Keys) || len(s.Keys) > 32 {
		return nil, fault.New(fault.Untrusted, "", "manifest threshold %d of %d keys", s.Threshold, len(s.Keys))
	}
	seen := map[string]bool{}
	var vs []note.Verifier
	for _, k := range s.Keys {
		v, err := note.NewVerifier(k)
		if err != nil {
			return nil, fault.New(fault.Untrusted, "", "manifest key %.80q: %w", k, err)
		}
		public := k[len(v.Name())+1+8:] // after "name+hash"
		// Recalls name a key by its text, so it has one; note's decoders pass over case and line ends.
		if seen[public] || k != fmt.Sprintf("%s+%08x%s", v.Name(), v.KeyHash(), public) || strings.ContainsAny(public, "\r\n") {
			return nil, fault.New(fault.Untrusted, "", "manifest key %s is listed twice, or not in its one spelling", v.Name())
		}
		seen[public] = true
		vs = append(vs, v)
	}
	return vs, nil
}

func (k ModuleKey) publicKey() (*rsa.PublicKey, error) {
	n := new(big.Int).SetBytes(k.Modulus)
	switch {
	case n.BitLen() < 2048 || n.BitLen() > 8192 || k.Modulus[0] == 0: // one spelling here too
		return nil, fault.New(fault.Untrusted, "", "module key %.60q has %d bits, want 2048 to 8192 and no zeros before them", k.Name, n.BitLen())
	case k.Exponent != 65537:
		return nil, fault.New(fault.Untrusted, "", "module key %.60q has exponent %d, want 65537", k.Name, k.Exponent)
	case len(k.Issuer) < 2 || len(k.Issuer) > 4096 || len(k.Serial) < 3 || len(k.Serial) > 64:
		return nil, fault.New(fault.Untrusted, "", "module key %.60q has no proper issuer and serial number", k.Name)
	}
	return &rsa.PublicKey{N: n, E: k.Exponent}, nil
}
