// SPDX-License-Identifier: Apache-2.0

// Package sign holds the publisher's private keys and makes the two
// signatures of a livepatch: the module signature, which kernels check, and
// the manifest signature, which klatchd and the root loader check. Keys lie in
// files of mode 0600, under a passphrase or not, or in tokens (package
// keyfile).
package sign

import (
	"context"
	"crypto"
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
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/datadir"
	"klatch/internal/keyfile"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
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
	if _, err := os.Stat(d.Anchor()); err == nil {
		return attest.MakeKeys(d) // the rest is complete, and may have moved to its holders
	}
	for role, n := range map[string]int{"root": rules["root"].Keys, "targets": rules["targets"].Keys} {
		if err := makeKeys(d, role, n, keyfile.NewECDSA); err != nil {
			return err
		}
	}
	for _, role := range []string{"snapshot", "timestamp"} {
		if err := makeKeys(d, role, 1, keyfile.NewEd25519); err != nil {
			return err
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

func makeKeys(d datadir.Dir, role string, n int, make func() ([]byte, error)) error {
	for i := range n {
		if err := makeFile(keyFile(d, role, i), make); err != nil {
			return err
		}
	}
	return nil
}

// MakeReleaseKeys makes what is missing of a release role's keys on this host.
func MakeReleaseKeys(d datadir.Dir, distro, arch string) (tufrepo.ReleaseRole, error) {
	r := tufrepo.ReleaseRole{Distro: distro, Arch: arch, Threshold: datadir.Rules[d.Policy.Profile]["release"].Need}
	role := releasePrefix + r.Name()
	if err := makeKeys(d, role, datadir.Rules[d.Policy.Profile]["release"].Keys, keyfile.NewECDSA); err != nil {
		return r, err
	}
	return r, publicHalves(d, role, &r)
}

// ReleaseKeys describes a release role by the key files of this host; ok is
// false where there are none.
func ReleaseKeys(d datadir.Dir, distro, arch string) (r tufrepo.ReleaseRole, ok bool, err error) {
	r = tufrepo.ReleaseRole{Distro: distro, Arch: arch, Threshold: datadir.Rules[d.Policy.Profile]["release"].Need}
	err = publicHalves(d, releasePrefix+r.Name(), &r)
	return r, len(r.Keys) > 0, err
}

func publicHalves(d datadir.Dir, role string, r *tufrepo.ReleaseRole) error {
	files, err := KeyFiles(d, role)
	for _, f := range files {
		var pub crypto.PublicKey
		if pub, err = keyfile.Public(f); err != nil {
			break
		}
		r.Keys = append(r.Keys, pub)
	}
	return err
}

const releasePrefix = "release-"

// KeyFiles lists the key files of a role that are on this host. The role of a
// release role's keys is "release-" and its name.
func KeyFiles(d datadir.Dir, role string) ([]string, error) {
	names, err := filepath.Glob(filepath.Join(d.Keys(), role+"-*.key"))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(n string) bool {
		_, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(n), role+"-"), ".key"))
		return err != nil
	}), nil
}

// NewKeyFile makes one more key of a role and returns its path.
func NewKeyFile(d datadir.Dir, role string) (string, error) {
	make := keyfile.NewECDSA
	if role == "snapshot" || role == "timestamp" {
		make = keyfile.NewEd25519
	}
	for i := 0; ; i++ {
		name := keyFile(d, role, i)
		if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			return name, makeFile(name, make)
		} else if err != nil {
			return "", err
		}
	}
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

func newRSA() ([]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, moduleKeyBits)
	if err != nil {
		return nil, err
	}
	return keyfile.Encode(key)
}

func newModuleCert(d datadir.Dir, now time.Time) ([]byte, error) {
	key, err := keyfile.Open(moduleKeyFile(d))
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

// ModuleCert is the certificate of the module key.
func ModuleCert(d datadir.Dir) (*x509.Certificate, error) {
	b, err := durable.ReadFile(ModuleCertFile(d), 64<<10)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(fault.Invalid, "bad_cert", "module certificate is not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_cert", "module certificate: %w", err)
	}
	return cert, nil
}

// moduleKey is the public description of the module key.
func moduleKey(d datadir.Dir) (trust.ModuleKey, error) {
	cert, err := ModuleCert(d)
	if err != nil {
		return trust.ModuleKey{}, err
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
	keys, err := RepositoryKeys(d, Root)
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
	return trustsign.Anchor(a)
}

// Which says which private keys to look for.
type Which int

// The keys of a run: All that are on this host, without those of the root
// unless Root is asked for; Unattended leaves out what needs a person.
const (
	All Which = iota
	Root
	Unattended
)

// RepositoryKeys reads the keys of the TUF roles that are on this host. Keys
// that are elsewhere are no error: the repository says whose are needed, and
// what this host cannot sign becomes a draft.
func RepositoryKeys(d datadir.Dir, which Which) (tufrepo.Keys, error) {
	rules := datadir.Rules[d.Policy.Profile]
	var k tufrepo.Keys
	k.Root.Threshold, k.Targets.Threshold, k.Snapshot.Threshold, k.Timestamp.Threshold = rules["root"].Need, rules["targets"].Need, 1, 1
	for role, to := range map[string]*tufrepo.Role{"root": &k.Root, "targets": &k.Targets, "snapshot": &k.Snapshot,
		"timestamp": &k.Timestamp, releasePrefix + "*": &k.Release} {
		if role == "root" && which != Root {
			continue
		}
		files, err := filepath.Glob(filepath.Join(d.Keys(), role+"-*.key"))
		if err != nil {
			return k, err
		}
		for _, f := range files {
			if protected, err := keyfile.Protected(f); err != nil {
				return k, err
			} else if protected && which == Unattended {
				continue
			}
			s, err := keyfile.Open(f)
			if err != nil {
				return k, err
			}
			to.Signers = append(to.Signers, s)
		}
	}
	if len(k.Timestamp.Signers) == 0 {
		return k, fault.New(fault.NotFound, "no_key", "no timestamp key in %s", d.Keys()).WithHint("is this the host that holds the publisher's keys?")
	}
	return k, nil
}

type manifestSigner struct {
	note.Signer
	public string // verifier key
}

func manifestSigners(d datadir.Dir) ([]manifestSigner, error) {
	var out []manifestSigner
	files, err := KeyFiles(d, "manifest")
	if err == nil && len(files) == 0 {
		err = fault.New(fault.NotFound, "no_key", "no manifest key in %s", d.Keys()).WithHint("is this the host that holds the publisher's keys?")
	}
	if err != nil {
		return nil, err
	}
	for i, f := range files {
		b, err := keyfile.Content(f)
		if err != nil {
			return nil, err
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
