// SPDX-License-Identifier: Apache-2.0

// Package enroll turns a token into a machine's own credential, and renews
// it. It owns what a token is worth and what a machine is called; it must not
// decide what a machine is offered. Start with Enroll.
package enroll

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"regexp"
	"time"

	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/server/store"
	"klatch/internal/wire"
)

// Limits of a token.
const (
	DefaultExpiry = 24 * time.Hour
	MaxExpiry     = 90 * 24 * time.Hour
	MaxUses       = 100_000
)

// DefaultTier is the tier of machines when nobody names one.
const DefaultTier = "stable"

var tierPattern = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// Enroller enrolls machines.
type Enroller struct {
	CA      *pki.CA
	Tokens  store.Tokens
	Mirrors store.Mirrors // nil: no mirror can join
	Now     func() time.Time
}

// Order is what a person asks for in a new token. Zero values mean one use,
// 24 hours and the default tier.
type Order struct {
	Uses    int
	Expires time.Duration
	Tier    string
	Role    store.Role // empty: for machines
}

// NewToken makes a token. It is shown to the caller once; what is stored is
// its digest.
func (e *Enroller) NewToken(ctx context.Context, o Order) (wire.Token, store.Token, error) {
	var none store.Token
	if o.Uses == 0 {
		o.Uses = 1
	}
	if o.Expires == 0 {
		o.Expires = DefaultExpiry
	}
	if o.Tier == "" {
		o.Tier = DefaultTier
	}
	if o.Role == "" {
		o.Role = store.ForMachine
	}
	switch {
	case o.Role != store.ForMachine && o.Role != store.ForMirror:
		return "", none, fault.New(fault.Invalid, "bad_role", "token for a %.60q: want a machine or a mirror", o.Role)
	case o.Uses < 1 || o.Uses > MaxUses:
		return "", none, fault.New(fault.Invalid, "bad_uses", "token for %d machines: want 1 to %d", o.Uses, MaxUses)
	case o.Expires < time.Minute || o.Expires > MaxExpiry:
		return "", none, fault.New(fault.Invalid, "bad_expiry", "token that expires after %s: want 1 minute to %s", o.Expires, MaxExpiry)
	case !tierPattern.MatchString(o.Tier):
		return "", none, fault.New(fault.Invalid, "bad_tier", "tier %.60q is not a name of lower-case letters, digits and dashes", o.Tier)
	}
	secret, err := pki.NewSecret()
	if err != nil {
		return "", none, err
	}
	now := e.Now().UTC()
	t := store.Token{Digest: secret.Digest(), Role: o.Role, Tier: o.Tier, Created: now, Expires: now.Add(o.Expires).Truncate(time.Second), Uses: o.Uses}
	if err := e.Tokens.AddToken(ctx, t); err != nil {
		return "", none, err
	}
	return secret.Token(e.CA.Fingerprint()), t, nil
}

// Enroll redeems a token. The request is checked before the token is touched,
// so that a mistake does not use it up; a machine that lost the answer asks
// again with the same key and stays the same machine.
func (e *Enroller) Enroll(ctx context.Context, q wire.EnrollRequest) (wire.EnrollAnswer, error) {
	var none wire.EnrollAnswer
	secret, csr, err := e.parse(q.Token, q.CSR)
	if err != nil {
		return none, err
	}
	now := e.Now()
	id, err := NewMachineID(now)
	if err != nil {
		return none, err
	}
	m, err := e.Tokens.Redeem(ctx, secret.Digest(), store.Machine{ID: id, KeyDigest: keyDigest(csr), Enrolled: now, Facts: q.Facts})
	if err != nil {
		return none, err
	}
	cert, expires, err := e.CA.SignMachine(csr, m.ID, now)
	if err != nil {
		return none, err
	}
	return wire.EnrollAnswer{MachineID: m.ID, Tier: m.Tier, Certificate: cert, CA: e.CA.Certificate(), Expires: expires}, nil
}

// parse checks what does not need the store.
func (e *Enroller) parse(token wire.Token, der []byte) (pki.Secret, pki.Request, error) {
	secret, ca, err := pki.ParseToken(token)
	if err != nil {
		return secret, pki.Request{}, err
	}
	if ca != e.CA.Fingerprint() {
		return secret, pki.Request{}, fault.New(fault.Denied, "token_unknown", "enrollment token is of another server").
			WithHint("make a token on this server: klatch-fleet token create, or klatch-server token create --mirror")
	}
	csr, err := pki.ParseRequest(der)
	return secret, csr, err
}

func keyDigest(csr pki.Request) string {
	key := csr.KeyDigest()
	return hex.EncodeToString(key[:])
}

// maxName limits what a mirror's operator calls it, in bytes.
const maxName = 253

// Join redeems a token for a mirror below this server.
func (e *Enroller) Join(ctx context.Context, q wire.JoinRequest) (wire.JoinAnswer, error) {
	var none wire.JoinAnswer
	if e.Mirrors == nil || q.Name == "" || len(q.Name) > maxName {
		return none, fault.New(fault.Invalid, "bad_name", "name of a mirror has %d bytes, want 1 to %d", len(q.Name), maxName)
	}
	secret, csr, err := e.parse(q.Token, q.CSR)
	if err != nil {
		return none, err
	}
	now := e.Now()
	id, err := newID("mir_", now)
	if err != nil {
		return none, err
	}
	m, err := e.Mirrors.RedeemMirror(ctx, secret.Digest(), store.Mirror{ID: id, Name: q.Name, KeyDigest: keyDigest(csr), Joined: now})
	if err != nil {
		return none, err
	}
	cert, expires, err := e.CA.SignMirror(csr, m.ID, now)
	return wire.JoinAnswer{MirrorID: m.ID, Certificate: cert, CA: e.CA.Certificate(), Expires: expires}, err
}

// RenewMirror signs a fresh certificate for a mirror whose old one was
// verified.
func (e *Enroller) RenewMirror(mirrorID string, q wire.RenewRequest) (wire.RenewAnswer, error) {
	csr, err := pki.ParseRequest(q.CSR)
	if err != nil {
		return wire.RenewAnswer{}, err
	}
	cert, expires, err := e.CA.SignMirror(csr, mirrorID, e.Now())
	return wire.RenewAnswer{Certificate: cert, Expires: expires}, err
}

// Renew signs a fresh certificate for a machine whose old one was verified.
func (e *Enroller) Renew(machineID string, q wire.RenewRequest) (wire.RenewAnswer, error) {
	csr, err := pki.ParseRequest(q.CSR)
	if err != nil {
		return wire.RenewAnswer{}, err
	}
	cert, expires, err := e.CA.SignMachine(csr, machineID, e.Now())
	return wire.RenewAnswer{Certificate: cert, Expires: expires}, err
}

// alphabet is Crockford's base 32 in lower case: sorted like its values.
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"

// NewMachineID makes an id of 48 bits of time in milliseconds and 80 random
// bits, so that ids sort by the time of enrollment.
func NewMachineID(now time.Time) (string, error) { return newID("mch_", now) }

func newID(prefix string, now time.Time) (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[6:]); err != nil {
		return "", err
	}
	ms := uint64(now.UnixMilli())
	for i := range 6 {
		b[i] = byte(ms >> (40 - 8*i)) //nolint:gosec // one byte is meant
	}
	// 128 bits are 26 digits of 5 bits, the first of which holds 3.
	out := make([]byte, 26)
	var acc uint32
	bits, pos := 2, 0 // two leading zero bits
	for _, x := range b {
		acc, bits = acc<<8|uint32(x), bits+8
		for bits >= 5 {
			bits -= 5
			out[pos] = alphabet[acc>>bits&31]
			pos++
		}
	}
	return prefix + string(out), nil
}
