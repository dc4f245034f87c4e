// SPDX-License-Identifier: Apache-2.0

// Package bootkeys says before any download whether this machine's kernel will
// take the publisher's module key: what firmware and shim gave the kernel to
// believe, compared with the module keys of the trust anchor. It reads without
// privilege, and never takes what it could not find out for good news.
//
// Read Judge first; Read gathers what it judges.
package bootkeys

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/trust"
)

// HowTo is where a person reads how the kernel gets the key.
const HowTo = "docs/howto/secure-boot.md"

// Word is the verdict in one word. Stored words are never renamed.
type Word string

// The verdicts.
const (
	Trusted     Word = "trusted"      // the kernel asks for a known key, and has ours
	Refused     Word = "refused"      // it asks, and certainly has not
	NotEnforced Word = "not_enforced" // it takes any module: the loader's check is the only one
	Unknown     Word = "unknown"
)

// Verdict is what becomes of a livepatch of this publisher, before there is
// one.
type Verdict struct {
	Word       Word       `json:"word"`
	Code       fault.Code `json:"code"`
	Text       string     `json:"text"`
	HowTo      string     `json:"how_to,omitempty"`
	SecureBoot Switch     `json:"secure_boot"`
}

// Kernel is what the running kernel says of itself.
type Kernel struct {
	Lockdown string // none, integrity, confidentiality; anything else: unknown
	Enforced string // yes, no; anything else: unknown
}

// asks says whether the kernel takes only modules with a key that it knows.
func (k Kernel) asks() Switch {
	switch {
	case k.Enforced == "yes", k.Lockdown == "integrity", k.Lockdown == "confidentiality":
		return On
	case k.Enforced == "no" && k.Lockdown == "none":
		return Off
	}
	return NotKnown
}

// Judge decides for the module keys of an anchor.
func Judge(k Kernel, f Firmware, keys []trust.ModuleKey) Verdict {
	say := func(w Word, c fault.Code, format string, args ...any) Verdict {
		v := Verdict{Word: w, Code: c, Text: fmt.Sprintf(format, args...), SecureBoot: f.SecureBoot}
		if w == Refused || w == Unknown {
			v.HowTo = HowTo
		}
		return v
	}
	asks := k.asks()
	if len(keys) > 0 && count(keys, f.revokes) == len(keys) {
		return say(Refused, "module_key_revoked", "the firmware revokes the publisher's module certificate (dbx); whether or not this kernel asks the firmware, klatchd does")
	}
	if asks == Off {
		return say(NotEnforced, "module_key_not_asked", "this kernel takes modules without a signature; only klatch-loader verifies livepatches")
	}
	if asks == NotKnown {
		return say(Unknown, "module_key_unknown_kernel", "whether this kernel takes unsigned modules could not be found out (lockdown %s, enforcement %s)", k.Lockdown, k.Enforced)
	}
	sources := f.believed()
	switch has := count(keys, func(m trust.ModuleKey) bool { return sources.has(m) }); {
	case len(keys) == 0:
		return say(Refused, "module_key_none", "every module key of the publisher was recalled")
	case has == len(keys) && f.Distribution == "":
		return say(Unknown, "module_key_other_kernel", "the firmware has the publisher's module key, but nobody has measured whether this kernel takes the firmware's keys for modules")
	case has == len(keys):
		return say(Trusted, "module_key_enrolled", "the publisher's module key is enrolled (%s)", sources.where(keys))
	case has > 0:
		return say(Unknown, "module_key_partly", "%d of the publisher's %d module keys are enrolled", has, len(keys))
	case len(f.Problems) > 0:
		return say(Unknown, "module_key_unread", "what the firmware gave this kernel to believe could not be read: %s", strings.Join(f.Problems, "; "))
	case sources.mayHide(keys):
		return say(Unknown, "module_key_unread", "a certificate that may vouch for the publisher's module key is enrolled")
	case f.Distribution == "":
		return say(Unknown, "module_key_builtin", "the publisher's module key is not enrolled in the firmware; it may be built into this kernel, which nobody without rights can see")
	}
	return say(Refused, "module_key_missing", "this kernel (by %s) takes only modules with a key that it knows, and the publisher's module key is not enrolled", f.Distribution)
}

func count(keys []trust.ModuleKey, f func(trust.ModuleKey) bool) (n int) {
	for _, k := range keys {
		if f(k) {
			n++
		}
	}
	return n
}

// store is one list of certificates with the name that people know it by.
type store struct {
	name string
	List
}

type stores []store

// believed are the lists whose certificates the kernel takes: db, unless shim
// was told to leave it out, and the owner's list of shim, which the kernel
// reads only with Secure Boot on (security/integrity/platform_certs/load_uefi.c).
func (f Firmware) believed() stores {
	var s stores
	if !f.IgnoreDB {
		s = append(s, store{"db", f.DB})
	}
	if f.SecureBoot == On {
		s = append(s, store{"MokListRT", f.MOK})
	}
	return s
}

func (s stores) has(k trust.ModuleKey) bool { return s.find(k) != "" }

func (s stores) find(k trust.ModuleKey) string {
	for _, l := range s {
		for _, c := range l.Certificates {
			if c.is(k) {
				return l.name
			}
		}
	}
	return ""
}

func (s stores) where(keys []trust.ModuleKey) string {
	var names []string
	for _, k := range keys {
		names = append(names, k.Name+" in "+s.find(k))
	}
	return strings.Join(names, ", ")
}

// mayHide says whether a certificate could make the kernel believe a key after
// all: the one of its issuer, or one that we cannot read and that holds it.
func (s stores) mayHide(keys []trust.ModuleKey) bool {
	for _, l := range s {
		for _, c := range l.Certificates {
			for _, k := range keys {
				if c.Parsed == nil && bytes.Contains(c.DER, k.Modulus) || c.Parsed != nil && bytes.Equal(c.Parsed.RawSubject, k.Issuer) {
					return true
				}
			}
		}
	}
	return false
}

// is says whether a module signature by the key names this certificate: the
// kernel looks for issuer and serial number, then tries the key.
func (c Certificate) is(k trust.ModuleKey) bool {
	if c.Parsed == nil || c.key == nil {
		return false
	}
	serial, err := asn1.Marshal(c.Parsed.SerialNumber)
	return err == nil && bytes.Equal(c.Parsed.RawIssuer, k.Issuer) && bytes.Equal(serial, k.Serial) &&
		c.key.E == k.Exponent && c.key.N.Cmp(new(big.Int).SetBytes(k.Modulus)) == 0
}

// revokes says whether dbx takes the key back: by a certificate with that key,
// or by the digest of its certificate, which an enrolled one is needed for,
// because the anchor holds the key alone.
func (f Firmware) revokes(k trust.ModuleKey) bool {
	for _, c := range f.DBX.Certificates {
		if c.key != nil && bytes.Equal(c.key.N.Bytes(), k.Modulus) {
			return true
		}
	}
	for _, c := range slices.Concat(f.DB.Certificates, f.MOK.Certificates) {
		if c.is(k) && slices.Contains(f.DBX.Revoked, sha256.Sum256(c.Parsed.RawTBSCertificate)) {
			return true
		}
	}
	return false
}
