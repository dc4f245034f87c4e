// SPDX-License-Identifier: Apache-2.0

// Package signed makes signed livepatches for tests, without a compiler: the
// module is the smallest file that the loader's policy takes.
package signed

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/klpfake"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

// Publisher holds keys; three for manifests, of which two must sign.
type Publisher struct {
	Signers   []note.Signer
	Verifiers []string
	Private   *rsa.PrivateKey
	Module    trust.ModuleKey
}

// NewPublisher makes keys.
func NewPublisher(name string) (Publisher, error) {
	var p Publisher
	for i := range 3 {
		private, public, err := note.GenerateKey(rand.Reader, fmt.Sprintf("%s-%d", strings.ReplaceAll(name, " ", "-"), i))
		if err != nil {
			return p, err
		}
		s, err := note.NewSigner(private)
		if err != nil {
			return p, err
		}
		p.Signers, p.Verifiers = append(p.Signers, s), append(p.Verifiers, public)
	}
	var err error
	if p.Private, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return p, err
	}
	p.Module = trust.ModuleKey{
		Name: name, Issuer: Issuer(name), Serial: []byte{0x02, 0x01, 0x07},
		Modulus: p.Private.N.Bytes(), Exponent: p.Private.E,
	}
	return p, nil
}

// Issuer is a Name with one common name, in DER; short ones only.
func Issuer(name string) []byte {
	out := append([]byte{0x0c, byte(len(name))}, name...)
	out = append([]byte{0x30, byte(5 + len(out)), 0x06, 0x03, 0x55, 0x04, 0x03}, out...)
	out = append([]byte{0x31, byte(len(out))}, out...)
	return append([]byte{0x30, byte(len(out))}, out...)
}

// Anchor is what a machine of this publisher holds.
func (p Publisher) Anchor() trust.Anchor {
	return trust.Anchor{
		Publisher: "test.example", Profile: trust.Small,
		Manifest:   trust.KeySet{Threshold: 2, Keys: p.Verifiers},
		ModuleKeys: []trust.ModuleKey{p.Module}, Root: []byte("{}"),
	}
}

// Serial is an INTEGER in DER.
func Serial(n *big.Int) []byte {
	b := n.Bytes()
	if len(b) == 0 || b[0]&0x80 != 0 {
		b = append([]byte{0}, b...)
	}
	return append([]byte{0x02, byte(len(b))}, b...)
}

// Manifest describes a signed module.
func Manifest(b kernel.Build, n livepatch.Sequence, module []byte) livepatch.Manifest {
	d256, d512 := sha256.Sum256(module), sha512.Sum512(module)
	if b.Distro == "" {
		b.Distro = "debian-12"
	}
	return livepatch.Manifest{
		Format: livepatch.ManifestFormat, Kernel: b, Sequence: n,
		Module: livepatch.Module{Name: n.ModuleName(), Bytes: int64(len(module)),
			SHA256: hex.EncodeToString(d256[:]), SHA512: hex.EncodeToString(d512[:])},
		Fixes:     []livepatch.Fix{{CVE: "CVE-2026-52928", Check: livepatch.Passed}},
		Functions: []livepatch.Function{{Object: "vmlinux", Name: "unix_stream_sendmsg"}},
	}
}

// Livepatch makes a whole one.
func (p Publisher) Livepatch(b kernel.Build, n livepatch.Sequence) (manifest, module []byte, err error) {
	module, err = trustsign.Module(klpfake.Module(klpfake.Words(b, n)), p.Module, p.Private, rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	manifest, err = trustsign.Manifest(Manifest(b, n, module), p.Signers[:2]...)
	return manifest, module, err
}
