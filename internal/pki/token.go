// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/wire"
)

// Fingerprint is the SHA-256 of a CA certificate in DER.
type Fingerprint [sha256.Size]byte

// Secret is 256 random bits that whoever holds them may use. It prints as
// "redacted" whatever the verb; only Reveal and Token show it.
type Secret struct{ b [32]byte }

// NewSecret draws a secret.
func NewSecret() (Secret, error) {
	var s Secret
	_, err := rand.Read(s.b[:])
	return s, err
}

// ParseSecret reads what Reveal wrote.
func ParseSecret(text string) (Secret, error) {
	var s Secret
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(b) != len(s.b) {
		return s, fault.New(fault.Denied, "secret_malformed", "secret is not 43 characters of base64url")
	}
	copy(s.b[:], b)
	return s, nil
}

// Digest is what may be stored: the SHA-256 in hexadecimal. The secret is
// random, so it needs no salt and no slow hash.
func (s Secret) Digest() string {
	sum := sha256.Sum256(s.b[:])
	return hex.EncodeToString(sum[:])
}

// Reveal shows the secret, once, to the person who asked for it.
func (s Secret) Reveal() string { return base64.RawURLEncoding.EncodeToString(s.b[:]) }

// String says "redacted".
func (Secret) String() string { return "redacted" }

// Format says "redacted" for every verb, %x and %#v included.
func (Secret) Format(f fmt.State, _ rune) { f.Write([]byte("redacted")) } //nolint:errcheck,gosec // nowhere to tell

// LogValue says "redacted".
func (Secret) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalText says "redacted".
func (Secret) MarshalText() ([]byte, error) { return []byte("redacted"), nil }

// Token joins a secret and a CA.
func (s Secret) Token(ca Fingerprint) wire.Token {
	return wire.Token(tokenVersion + "." + s.Reveal() + "." + base64.RawURLEncoding.EncodeToString(ca[:]))
}

const tokenVersion = "klatch1"

// ParseToken reads an enrollment token. The text of its errors never holds any
// part of the token.
func ParseToken(t wire.Token) (Secret, Fingerprint, error) {
	var ca Fingerprint
	bad := func() (Secret, Fingerprint, error) {
		return Secret{}, Fingerprint{}, fault.New(fault.Invalid, "token_malformed", "enrollment token is not of the form klatch1.<secret>.<ca>").
			WithHint("copy the whole line that klatch-fleet token create printed")
	}
	parts := strings.Split(string(t), ".")
	if len(parts) != 3 || parts[0] != tokenVersion {
		return bad()
	}
	s, err := ParseSecret(parts[1])
	if err != nil {
		return bad()
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
	if err != nil || len(b) != len(ca) {
		return bad()
	}
	copy(ca[:], b)
	return s, ca, nil
}
