// SPDX-License-Identifier: Apache-2.0

// Package sign holds the publisher's private keys and makes the two
// signatures of a livepatch: the module signature, which kernels check, and
// the manifest signature, which klatchd and the root loader check. Keys lie in
// files of mode 0600; a token or a second host are later drivers of the same
// interface (crypto.Signer).
package sign

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/datadir"
	"klatch/internal/trust"
	"klatch/internal/tufrepo"
)

// moduleKeyBits: RSA-4096 with SHA-256 is what every kernel here accepts;
// Debian 12's has neither ECDSA nor, at boot, SHA-512.
const moduleKeyBits = 4096

// moduleCertLife is long because kernels do not look at it; revocation is
// ours to do.
const moduleCertLife = 10 * 365 * 24 * time.Hour

// MakeKeys makes what is missing of a publisher's keys, the first root of the
// repository and the anchor. It may be repeated after a crash: keys that are
// there stay.
func MakeKeys(ctx context.Context, d datadir.Dir, now time.Time) error {
	rules := datadir.Rules[d.Policy.Profile]
	for role, n := range map[string]int{"root": rules["root"].Keys, "targets": rules["targets"].Keys, "snapshot": 1, "timestamp": 1} {
		for i := range n {
			if err := makeFile(keyFile(d, role, i), newEd25519); err != nil {
				return err
			}
		}
	}
	for i := range rules["manifest"].Keys {
		name := fmt.Sprintf("%s/manifest-%d", d.Policy.Publisher, i+1)
		if err := makeFile(keyFile(d, "manifest", i), func() ([]byte, error) {
			secret, _, err := note.GenerateKey(rand.Reader, name)
			return []byte(secret + "\n"), err
		}); err != nil {
			return err
		}
	}
	if err := makeFile(moduleKeyFile(d), newRSA); err != nil {
		return err
	}
	if err := makeFile(ModuleCertFile(d), func() ([]byte, error) { return newModuleCert(d, now) }); err != nil {
		return err
	}
	if err := attest.MakeKeys(d); err != nil {
		return err
	}
	return makeFile(d.Anchor(), func() ([]byte, error) { return newAnchor(ctx, d, now) })
}

func keyFile(d datadir.Dir, role string, i int) string {
	return filepath.Join(d.Keys(), fmt.Sprintf("%s-%d.key", role, i+1))
}

func moduleKeyFile(d datadir.Dir) string { return filepath.Join(d.Keys(), "module.key") }

// ModuleCertFile is the certificate of the module key, in PEM: what a machine
// with Secure Boot enrolls.
func ModuleCertFile(d datadir.Dir) string { return filepath.Join(d.Path, "module.pem") }

func makeFile(path string, content func() ([]byte, error)) error {
	if _, err := durable.ReadFile(path, 1<<20); !errors.Is(err, fs.ErrNotExist) {
		return err // there already, or unreadable
	}
	b, err := content()
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	mode := fs.FileMode(0o644)
	if strings.HasSuffix(path, ".key") {
		mode = 0o600
	}
	return durable.WriteFile(path, b, mode)
}

func newEd25519() ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return encodeKey(key)
}

func newRSA() ([]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, moduleKeyBits)
	if err != nil {
		return nil, err
	}
	return encodeKey(key)
}

func encodeKey(key crypto.PrivateKey) ([]byte, error) {
	b, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}), nil
}

func readKey(path string) (crypto.Signer, error) {
	b, err := durable.ReadFile(path, 64<<10)
	if err != nil {
		return nil, fault.New(fault.NotFound, "no_key", "private key: %w", err).WithHint("is this the host that holds the publisher's keys?")
	}
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

func newModuleCert(d datadir.Dir, now time.Time) ([]byte, error) {
	key, err := readKey(moduleKeyFile(d))
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)),
		Subject:      pkix.Name{CommonName: "Klatch module key of " + d.Policy.Publisher},
		NotBefore:    now.Add(-time.Hour), NotAfter: now.Add(moduleCertLife),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// moduleKey is the public description of the module key.
func moduleKey(d datadir.Dir) (trust.ModuleKey, error) {
	b, err := durable.ReadFile(ModuleCertFile(d), 64<<10)
	if err != nil {
		return trust.ModuleKey{}, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return trust.ModuleKey{}, fault.New(fault.Invalid, "bad_cert", "module certificate is not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return trust.ModuleKey{}, fault.New(fault.Invalid, "bad_cert", "module certificate: %w", err)
	}
	pub, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return trust.ModuleKey{}, fault.New(fault.Invalid, "bad_cert", "module certificate holds no RSA key")
	}
	serial, err := asn1.Marshal(cert.SerialNumber)
	if err != nil {
		return trust.ModuleKey{}, err
	}
	return trust.ModuleKey{Name: cert.Subject.CommonName, Issuer: cert.RawIssuer, Serial: serial,
		Modulus: pub.N.Bytes(), Exponent: pub.E}, nil
}

func newAnchor(ctx context.Context, d datadir.Dir, now time.Time) ([]byte, error) {
	keys, err := RepositoryKeys(d, true)
	if err != nil {
		return nil, err
	}
	root, err := tufrepo.Init(ctx, d.Repository(), keys, now)
	if fault.KindOf(err) == fault.Conflict { // an earlier run got this far
		root, err = durable.ReadFile(filepath.Join(d.Repository(), "metadata", "1.root.json"), 1<<20)
	}
	if err != nil {
		return nil, err
	}
	mk, err := moduleKey(d)
	if err != nil {
		return nil, err
	}
	signers, err := manifestSigners(d)
	if err != nil {
		return nil, err
	}
	a := trust.Anchor{Publisher: d.Policy.Publisher, Profile: d.Policy.Profile, ModuleKeys: []trust.ModuleKey{mk}, Root: root,
		Manifest: trust.KeySet{Threshold: datadir.Rules[d.Policy.Profile]["manifest"].Need}}
	for _, s := range signers {
		a.Manifest.Keys = append(a.Manifest.Keys, s.public)
	}
	return a.Encode()
}

// RepositoryKeys reads the keys of the TUF roles; the root's only on demand.
func RepositoryKeys(d datadir.Dir, withRoot bool) (tufrepo.Keys, error) {
	rules := datadir.Rules[d.Policy.Profile]
	var k tufrepo.Keys
	for _, r := range []struct {
		name string
		t    datadir.Thresholds
		to   *tufrepo.Role
	}{
		{"root", rules["root"], &k.Root}, {"targets", rules["targets"], &k.Targets},
		{"snapshot", datadir.Thresholds{Keys: 1, Need: 1}, &k.Snapshot}, {"timestamp", datadir.Thresholds{Keys: 1, Need: 1}, &k.Timestamp},
	} {
		if r.name == "root" && !withRoot {
			continue
		}
		r.to.Threshold = r.t.Need
		for i := range r.t.Keys {
			s, err := readKey(keyFile(d, r.name, i))
			if err != nil {
				return k, err
			}
			r.to.Signers = append(r.to.Signers, s)
		}
	}
	return k, nil
}

type manifestSigner struct {
	note.Signer
	public string // verifier key
}

func manifestSigners(d datadir.Dir) ([]manifestSigner, error) {
	var out []manifestSigner
	for i := range datadir.Rules[d.Policy.Profile]["manifest"].Keys {
		b, err := durable.ReadFile(keyFile(d, "manifest", i), 64<<10)
		if err != nil {
			return nil, fault.New(fault.NotFound, "no_key", "manifest key: %w", err).WithHint("is this the host that holds the publisher's keys?")
		}
		secret := strings.TrimSpace(string(b))
		s, err := note.NewSigner(secret)
		if err != nil {
			return nil, fault.New(fault.Invalid, "bad_key", "manifest key %d: %w", i+1, err)
		}
		public, err := verifierKey(secret)
		if err != nil {
			return nil, err
		}
		out = append(out, manifestSigner{s, public})
	}
	return out, nil
}
