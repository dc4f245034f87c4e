// SPDX-License-Identifier: Apache-2.0

// Package keyfile reads and writes the files in which the private keys of a
// publisher or an operator lie: PKCS#8 in PEM; the same under a passphrase; or a line that names a
// key in a PKCS#11 token. It must not know what a key is for.
//
// A protected file is a PEM block whose bytes are the go-securesystemslib
// "encrypted" form: scrypt (N 2^17, r 8, p 1) and NaCl secretbox, the form in
// which cosign keeps its keys. Its header holds the public half, so that a key
// can be found without its passphrase. A passphrase comes from a terminal or
// from the file that KLATCH_PASSPHRASE_FILE names, never from a command line.
package keyfile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/encrypted"
	"golang.org/x/term"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/token"
)

// PassphraseEnv names the environment variable with the path of a file whose
// first line is the passphrase.
const PassphraseEnv = "KLATCH_PASSPHRASE_FILE" //nolint:gosec // a name, not a secret

const (
	maxFile       = 64 << 10
	plainType     = "PRIVATE KEY"
	protectedType = "KLATCH ENCRYPTED FILE"
	publicHeader  = "Public"
	tokenScheme   = "pkcs11:"
)

// NewECDSA makes a key for people: ECDSA P-256, which tokens can hold too.
func NewECDSA() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return Encode(key)
}

// NewEd25519 makes a key for a service.
func NewEd25519() ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return Encode(key)
}

// Encode writes a private key as PKCS#8 in PEM.
func Encode(key crypto.PrivateKey) ([]byte, error) {
	b, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: plainType, Bytes: b}), nil
}

// Protect puts a file's content under a passphrase. public is the key's public
// half, or nil where the content is no PKCS#8 key.
func Protect(content, passphrase []byte, public crypto.PublicKey) ([]byte, error) {
	if len(passphrase) < 8 {
		return nil, fault.New(fault.Invalid, "short_passphrase", "the passphrase has %d characters, want 8 or more", len(passphrase))
	}
	if block, _ := pem.Decode(content); block != nil && block.Type == protectedType {
		return nil, fault.New(fault.Conflict, "protected", "the file is under a passphrase already")
	}
	sealed, err := encrypted.EncryptWithCustomKDFParameters(content, passphrase, encrypted.OWASP)
	if err != nil {
		return nil, err
	}
	block := &pem.Block{Type: protectedType, Bytes: sealed, Headers: map[string]string{}}
	if public != nil {
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			return nil, err
		}
		block.Headers[publicHeader] = base64.StdEncoding.EncodeToString(der)
	}
	return pem.EncodeToMemory(block), nil
}

// Content is what a key file holds, with the passphrase asked for where there
// is one.
func Content(path string) ([]byte, error) {
	b, err := read(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != protectedType {
		return b, nil
	}
	return open(path, block)
}

// Protected says whether using the key needs a person, or a token's PIN.
func Protected(path string) (bool, error) {
	b, err := read(path)
	if err != nil {
		return false, err
	}
	block, _ := pem.Decode(b)
	return block != nil && block.Type == protectedType || bytes.HasPrefix(b, []byte(tokenScheme)), nil
}

// Open makes a signer of a key file. A passphrase is asked for when it first
// signs.
func Open(path string) (crypto.Signer, error) {
	b, err := read(path)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(b, []byte(tokenScheme)) {
		return token.Open(strings.TrimSpace(string(b)))
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(fault.Invalid, "bad_key", "private key %s is not PEM", path)
	}
	if block.Type != protectedType {
		return parse(path, b)
	}
	der, err := base64.StdEncoding.DecodeString(block.Headers[publicHeader])
	if err != nil || len(der) == 0 {
		return nil, fault.New(fault.Invalid, "bad_key", "private key %s does not say its public half", path)
	}
	public, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_key", "private key %s: public half: %w", path, err)
	}
	return &later{path: path, block: block, public: public}, nil
}

// Public reads a public key in PEM, or the public half of a key file.
func Public(path string) (crypto.PublicKey, error) {
	b, err := read(path)
	if err != nil {
		return nil, err
	}
	if block, _ := pem.Decode(b); block != nil && block.Type == "PUBLIC KEY" {
		return x509.ParsePKIXPublicKey(block.Bytes)
	}
	s, err := Open(path)
	if err != nil {
		return nil, err
	}
	return s.Public(), nil
}

// PublicOf gives the public half of an unprotected key file's content.
func PublicOf(content []byte) (crypto.PublicKey, error) {
	s, err := parse("", content)
	if err != nil {
		return nil, err
	}
	return s.Public(), nil
}

// EncodePublic writes a public key in PEM.
func EncodePublic(public crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

func read(path string) ([]byte, error) {
	b, err := durable.ReadFile(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "no_key", "private key: %w", err).WithHint("is this the host that holds the keys?")
	}
	return b, err
}

func parse(path string, b []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(fault.Invalid, "bad_key", "private key %s is not PEM", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_key", "private key %s: %w", path, err)
	}
	s, ok := key.(crypto.Signer)
	if !ok {
		return nil, fault.New(fault.Invalid, "bad_key", "private key %s cannot sign", path)
	}
	return s, nil
}

func open(path string, block *pem.Block) ([]byte, error) {
	passphrase, err := Passphrase("passphrase of " + path)
	if err != nil {
		return nil, err
	}
	b, err := encrypted.Decrypt(block.Bytes, passphrase)
	if err != nil {
		return nil, fault.New(fault.Denied, "wrong_passphrase", "open %s: wrong passphrase, or a damaged file", path).
			WithHint("try again; a lost passphrase is a lost key: klatch-forge keys remove")
	}
	return b, nil
}

// later is a signer that asks for its passphrase when it is needed.
type later struct {
	path   string
	block  *pem.Block
	public crypto.PublicKey
	opened crypto.Signer
}

func (l *later) Public() crypto.PublicKey { return l.public }

func (l *later) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if l.opened == nil {
		b, err := open(l.path, l.block)
		if err != nil {
			return nil, err
		}
		s, err := parse(l.path, b)
		if err != nil {
			return nil, err
		}
		if p, ok := l.public.(interface{ Equal(crypto.PublicKey) bool }); !ok || !p.Equal(s.Public()) {
			return nil, fault.New(fault.Untrusted, "bad_key", "private key %s is not the one whose public half it says", l.path)
		}
		l.opened = s
	}
	return l.opened.Sign(random, digest, opts)
}

// Passphrase reads one from the file that PassphraseEnv names, else from the
// terminal.
func Passphrase(what string) ([]byte, error) {
	if name := os.Getenv(PassphraseEnv); name != "" {
		b, err := durable.ReadFile(name, 4096)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		line, _, _ := bytes.Cut(b, []byte("\n"))
		return line, nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, fault.New(fault.Invalid, "no_passphrase", "%s is needed, and there is no terminal to ask", what).
			WithHint("write it into a file that only you can read, and name that in %s", PassphraseEnv)
	}
	defer tty.Close() //nolint:errcheck // a terminal
	if _, err := fmt.Fprintf(tty, "%s: ", what); err != nil {
		return nil, err
	}
	b, err := term.ReadPassword(int(tty.Fd()))
	_, e := fmt.Fprintln(tty)
	return b, errors.Join(err, e)
}
