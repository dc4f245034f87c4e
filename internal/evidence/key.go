// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"net/mail"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// Role is what a signer may say.
type Role string

// The roles. The stored form is the string; it is never renamed.
const (
	Builder  Role = "builder"  // provenance
	Tester   Role = "tester"   // test results
	Reviewer Role = "reviewer" // reviews
	Analyst  Role = "analyst"  // which CVEs are fixed, affected or not
)

// Roles lists all.
var Roles = []Role{Builder, Tester, Reviewer, Analyst}

// PublicKey is an Ed25519 key that signs statements. Its text is standard
// base64.
type PublicKey struct{ bytes [ed25519.PublicKeySize]byte }

// ParsePublicKey reads a key's text, in its one form.
func ParsePublicKey(s string) (PublicKey, error) {
	var k PublicKey
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(k.bytes) || base64.StdEncoding.EncodeToString(b) != s {
		return k, fault.New(fault.Invalid, "bad_key", "%.60q is not an Ed25519 key in base64", s)
	}
	copy(k.bytes[:], b)
	return k, nil
}

func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k.bytes[:]) }

// ID names the key in an envelope.
func (k PublicKey) ID() string {
	sum := sha256.Sum256(k.bytes[:])
	return hex.EncodeToString(sum[:])
}

// MarshalText implements encoding.TextMarshaler.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *PublicKey) UnmarshalText(b []byte) (err error) {
	*k, err = ParsePublicKey(string(b))
	return err
}

var signerName = regexp.MustCompile(`^[a-z0-9][a-z0-9@._-]{0,62}$`)

// Signer is one who may sign statements, as the policy lists them.
type Signer struct {
	Name  string    `json:"name" toml:"name"`
	Roles []Role    `json:"roles" toml:"roles"`
	Key   PublicKey `json:"key" toml:"key"`
	// Also lists what else the same person is called, as an author of source
	// patches for one: e-mail addresses, names.
	Also []string `json:"also,omitempty" toml:"also,omitempty"`
}

// May says whether the signer has a role.
func (s Signer) May(r Role) bool { return slices.Contains(s.Roles, r) }

// Is says whether the signer is the author of a source patch. The author is
// free text, such as "Alice Example <alice@example.org>".
func (s Signer) Is(author string) bool {
	mine := []string{fold(s.Name)}
	for _, a := range s.Also {
		mine = append(mine, calledBy(a)...)
	}
	return slices.ContainsFunc(calledBy(author), func(a string) bool { return slices.Contains(mine, a) })
}

// calledBy lists the ways to read an author: all of it, the name, the e-mail
// address and the part of that before the @.
func calledBy(author string) []string {
	all := []string{fold(author)}
	name, rest, ok := strings.Cut(author, "<")
	address := strings.TrimSuffix(strings.TrimSpace(rest), ">")
	if !ok {
		address = author
	}
	local, host, _ := strings.Cut(address, "@")
	box, _, _ := strings.Cut(local, "+") // bob+kernel@ is bob@
	for _, s := range []string{name, address, local, box, box + "@" + host} {
		if s = fold(s); s != "" {
			all = append(all, s)
		}
	}
	return all
}

// oneAuthor says whether a text names one person with an address, as "Alice
// Example <alice@example.org>" does.
func oneAuthor(author string) bool {
	list, err := mail.ParseAddressList(author)
	return err == nil && len(list) == 1
}

// hasAddress says whether the policy gives an address of the signer, by which
// it can be told from an author.
func (s Signer) hasAddress() bool {
	return slices.ContainsFunc(append([]string{s.Name}, s.Also...), func(a string) bool { return strings.Contains(a, "@") })
}

func fold(s string) string { return strings.ToLower(strings.Join(strings.Fields(s), " ")) }

func (s Signer) check() error {
	bad := func(format string, args ...any) *fault.Error {
		return fault.New(fault.Invalid, "bad_signer", format, args...)
	}
	if !signerName.MatchString(s.Name) {
		return bad("%.80q cannot name a signer", s.Name).WithHint("use lower-case letters, digits, dots, dashes and @")
	}
	if len(s.Roles) == 0 {
		return bad("signer %s has no role", s.Name)
	}
	for i, r := range s.Roles {
		if !slices.Contains(Roles, r) || slices.Contains(s.Roles[:i], r) {
			return bad("signer %s: role %.40q is unknown or there twice", s.Name, r)
		}
	}
	if s.Key == (PublicKey{}) {
		return bad("signer %s has no key", s.Name)
	}
	return nil
}

// PrivateKey signs statements in the name of a signer.
type PrivateKey struct {
	Name  string
	Roles []Role
	key   ed25519.PrivateKey
}

// NewKey makes a key.
func NewKey(name string, roles ...Role) (PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return PrivateKey{}, err
	}
	k := PrivateKey{name, roles, key}
	return k, k.Signer().check()
}

// Public is the half that the policy lists.
func (k PrivateKey) Public() PublicKey {
	var p PublicKey
	copy(p.bytes[:], k.key[ed25519.SeedSize:]) // crypto/ed25519: seed, then public key
	return p
}

// Signer is how the policy lists the key.
func (k PrivateKey) Signer() Signer { return Signer{Name: k.Name, Roles: k.Roles, Key: k.Public()} }

const pemType = "PRIVATE KEY"

// Encode writes the key file: PKCS #8 in PEM, name and roles as headers.
func (k PrivateKey) Encode() ([]byte, error) {
	b, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		return nil, err
	}
	var roles []string
	for _, r := range k.Roles {
		roles = append(roles, string(r))
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: b,
		Headers: map[string]string{"Name": k.Name, "Roles": strings.Join(roles, " ")}}), nil
}

// ParsePrivateKey reads a key file.
func ParsePrivateKey(b []byte) (PrivateKey, error) {
	bad := func(format string, args ...any) (PrivateKey, error) {
		return PrivateKey{}, fault.New(fault.Invalid, "bad_key", "evidence key: "+format, args...)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != pemType {
		return bad("not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return bad("%w", err)
	}
	e, ok := key.(ed25519.PrivateKey)
	if !ok {
		return bad("not Ed25519")
	}
	k := PrivateKey{Name: block.Headers["Name"], key: e}
	for r := range strings.FieldsSeq(block.Headers["Roles"]) {
		k.Roles = append(k.Roles, Role(r))
	}
	return k, k.Signer().check()
}
