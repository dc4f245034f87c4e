// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
)

// The types of a note key (C2SP signed-note, "Signatures").
const (
	typeEd25519     = 1
	typeCosignature = 4
	typeMLDSA       = 6
)

// Verifier checks one kind of signature by one key.
type Verifier struct {
	name    string
	id      uint32
	public  ed25519.PublicKey
	kind    byte
	verbose string // verifier key
}

// Name is the key's name: the origin of a log, or the name of a witness.
func (v *Verifier) Name() string { return v.name }

// KeyHash is the key's id in signature lines.
func (v *Verifier) KeyHash() uint32 { return v.id }

// String is the verifier key.
func (v *Verifier) String() string { return v.verbose }

// Verify checks a signature over a note's text.
func (v *Verifier) Verify(text, sig []byte) bool {
	if v.kind == typeEd25519 {
		return len(sig) == ed25519.SignatureSize && ed25519.Verify(v.public, text, sig)
	}
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := binary.BigEndian.Uint64(sig)
	return at < 1<<63 && ed25519.Verify(v.public, cosigned(at, text), sig[8:])
}

// cosigned is the message of a cosignature (C2SP tlog-cosignature).
func cosigned(at uint64, text []byte) []byte {
	return fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", at, text)
}

func keyID(name string, kind byte, public ed25519.PublicKey) uint32 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%c%s", name, kind, public))
	return binary.BigEndian.Uint32(sum[:4])
}

func newVerifier(name string, kind byte, public ed25519.PublicKey) *Verifier {
	id := keyID(name, kind, public)
	raw := append([]byte{kind}, public...)
	return &Verifier{name, id, public, kind, fmt.Sprintf("%s+%08x+%s", name, id, base64.StdEncoding.EncodeToString(raw))}
}

func validName(name string) bool {
	return name != "" && len(name) <= 255 && utf8.ValidString(name) && !strings.Contains(name, "+") &&
		strings.IndexFunc(name, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) < 0
}

// parseKey reads a verifier key of one kind.
func parseKey(s string, kind byte) (*Verifier, error) {
	parts := strings.SplitN(s, "+", 3)
	if len(parts) != 3 || !validName(parts[0]) {
		return nil, fault.New(fault.Invalid, CodePolicy, "%.80q is not a verifier key", s)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(parts[2])
	switch {
	case err != nil || len(raw) == 0:
		return nil, fault.New(fault.Invalid, CodePolicy, "verifier key of %.60q is not base64", parts[0])
	case raw[0] == typeMLDSA:
		return nil, fault.New(fault.Invalid, CodePolicy, "verifier key of %.60q is of type ML-DSA-44, which this version does not know", parts[0]).
			WithHint("use an Ed25519 witness key (type 4)")
	case raw[0] != kind || len(raw) != 1+ed25519.PublicKeySize:
		return nil, fault.New(fault.Invalid, CodePolicy, "verifier key of %.60q is of type %d with %d bytes, want type %d with %d", parts[0], raw[0], len(raw)-1, kind, ed25519.PublicKeySize).
			WithHint("a log's key has type 1, a witness's type 4")
	}
	v := newVerifier(parts[0], kind, raw[1:])
	if v.verbose != s {
		return nil, fault.New(fault.Invalid, CodePolicy, "verifier key of %.60q has another key id than its own", parts[0])
	}
	return v, nil
}

// ParseLogKey reads a log's verifier key; its name is the log's origin.
func ParseLogKey(s string) (*Verifier, error) { return parseKey(s, typeEd25519) }

// ParseWitnessKey reads a witness's verifier key.
func ParseWitnessKey(s string) (*Verifier, error) { return parseKey(s, typeCosignature) }

// Secret is a private key: of a log or of a witness.
type Secret struct {
	name string
	key  ed25519.PrivateKey
}

// ParseSecret reads a signer key of golang.org/x/mod/sumdb/note
// ("PRIVATE+KEY+name+id+base64"), which note.GenerateKey makes.
func ParseSecret(s string) (Secret, error) {
	bad := fault.New(fault.Invalid, "bad_key", "private key is not an Ed25519 note key")
	parts := strings.SplitN(strings.TrimSpace(s), "+", 5)
	if len(parts) != 5 || parts[0] != "PRIVATE" || parts[1] != "KEY" || !validName(parts[2]) {
		return Secret{}, bad
	}
	raw, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(raw) != 1+ed25519.SeedSize || raw[0] != typeEd25519 {
		return Secret{}, bad
	}
	return Secret{parts[2], ed25519.NewKeyFromSeed(raw[1:])}, nil
}

func (s Secret) public() ed25519.PublicKey {
	return ed25519.PublicKey(s.key[ed25519.SeedSize:]) // crypto/ed25519: seed, then public key
}

// Log is the verifier of what the key signs as a log.
func (s Secret) Log() *Verifier { return newVerifier(s.name, typeEd25519, s.public()) }

// Witness is the verifier of what the key cosigns.
func (s Secret) Witness() *Verifier { return newVerifier(s.name, typeCosignature, s.public()) }

// Cosign makes the signature line of a witness under a checkpoint's text. It
// says: at this time, this is the largest tree I have seen, and it holds all
// that I have seen before.
func (s Secret) Cosign(text string, now time.Time) string {
	at := uint64(now.Unix()) //nolint:gosec // after 1970
	v := s.Witness()
	var b bytes.Buffer
	var word [8]byte
	binary.BigEndian.PutUint32(word[:4], v.id)
	b.Write(word[:4])
	binary.BigEndian.PutUint64(word[:], at)
	b.Write(word[:])
	b.Write(ed25519.Sign(s.key, cosigned(at, []byte(text))))
	return "— " + s.name + " " + base64.StdEncoding.EncodeToString(b.Bytes()) + "\n"
}

var _ note.Verifier = (*Verifier)(nil)
