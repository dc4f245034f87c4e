// SPDX-License-Identifier: Apache-2.0

package sign

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/keyfile"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

// verifierKey derives the public form of a note signing key
// (sumdb/note, "Signer keys": PRIVATE+KEY+name+hash+base64(type, seed)).
func verifierKey(secret string) (string, error) {
	parts := strings.SplitN(secret, "+", 5)
	if len(parts) != 5 {
		return "", fault.New(fault.Invalid, "bad_key", "manifest key is not a note signing key")
	}
	b, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(b) != 1+ed25519.SeedSize {
		return "", fault.New(fault.Invalid, "bad_key", "manifest key is not an Ed25519 seed")
	}
	pub, ok := ed25519.NewKeyFromSeed(b[1:]).Public().(ed25519.PublicKey)
	if !ok {
		return "", fault.New(fault.Internal, "", "Ed25519 key without a public half")
	}
	return note.NewEd25519VerifierKey(parts[2], pub)
}

// File names beside a build.
const (
	signedModule = "signed.ko"
	bundleFile   = "bundle.lpb"
)

// BundleFile is where the signed bundle of a build lies.
func BundleFile(d datadir.Dir, b build.Result) string {
	return filepath.Join(build.Dir(d.Path, b.Kernel, b.Sequence), bundleFile)
}

// Result is a signed livepatch: what its manifest says, and the evidence that
// it passed the gate with.
type Result struct {
	Manifest livepatch.Manifest
	Evidence evidence.Report
}

// Sign is the signing gate: it signs a livepatch whose evidence suffices
// (package attest), and writes bundle and evidence file. Signing again gives
// the same bundle: neither signature holds a time or a random number.
func Sign(d datadir.Dir, b build.Result, now time.Time) (Result, error) {
	var res Result
	dir := build.Dir(d.Path, b.Kernel, b.Sequence)
	raw, err := durable.ReadFile(b.Module.Path, livepatch.MaxModule)
	if err != nil {
		return res, err
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != b.Module.SHA256 {
		return res, fault.New(fault.Untrusted, "module_digest", "module %s is not the one that was built", b.Module.Path).
			WithHint("build again: klatch-forge build --kernel %s", b.Kernel)
	}
	earlier, err := Before(d, b)
	if err != nil {
		return res, err
	}
	file, report, err := attest.Gate(d, b, earlier, now)
	if err != nil {
		return res, err
	}
	mk, err := moduleKey(d)
	if err != nil {
		return res, err
	}
	key, err := keyfile.Open(moduleKeyFile(d))
	if err != nil {
		return res, err
	}
	signed, err := trustsign.Module(raw, mk, key, rand.Reader)
	if err != nil {
		return res, err
	}
	s256, s512 := sha256.Sum256(signed), sha512.Sum512(signed)
	res.Manifest = livepatch.Manifest{Format: livepatch.ManifestFormat, Kernel: b.KernelBuild(), Sequence: b.Sequence,
		Module: livepatch.Module{Name: b.Sequence.ModuleName(), Bytes: int64(len(signed)),
			SHA256: hex.EncodeToString(s256[:]), SHA512: hex.EncodeToString(s512[:])},
		Fixes: report.Fixes, Functions: b.Functions}
	signers, err := manifestSigners(d)
	if err != nil {
		return res, err
	}
	var ns []note.Signer
	for _, s := range signers {
		ns = append(ns, s)
	}
	manifest, err := trustsign.Manifest(res.Manifest, ns...)
	if err != nil {
		return res, err
	}
	if err := verifyOwn(d, manifest, signed); err != nil {
		return res, err
	}
	// Again with the manifest, as a stranger will.
	policy, err := attest.ReadPolicy(d)
	if err != nil {
		return res, err
	}
	if res.Evidence, err = evidence.Check(policy, attest.Facts(file, earlier, now, &res.Manifest), file.Statements); err != nil {
		return res, err
	}
	if err := durable.WriteFile(filepath.Join(dir, signedModule), signed, 0o644); err != nil {
		return res, err
	}
	if err := attest.WriteFile(dir, file); err != nil {
		return res, err
	}
	return res, durable.WriteFile(filepath.Join(dir, bundleFile), livepatch.Bundle{Manifest: manifest, Module: signed}.Encode(), 0o644)
}

// Before lists the lower sequences of the kernel that were signed:
// machines may have them.
func Before(d datadir.Dir, b build.Result) ([]livepatch.Sequence, error) {
	all, err := build.Read(d.Path, b.Kernel)
	if err != nil {
		return nil, err
	}
	signed, err := Signed(d, all)
	if err != nil {
		return nil, err
	}
	var out []livepatch.Sequence
	for _, o := range signed {
		if o.Sequence < b.Sequence {
			out = append(out, o.Sequence)
		}
	}
	return out, nil
}

// Recalls signs recalls with the manifest keys, and checks as a machine would
// that they are enough.
func Recalls(d datadir.Dir, r livepatch.Recalls) ([]byte, error) {
	signers, err := manifestSigners(d)
	if err != nil {
		return nil, err
	}
	var ns []note.Signer
	for _, s := range signers {
		if !r.Revokes([]byte(s.public)) {
			ns = append(ns, s)
		}
	}
	signed, err := trustsign.Recalls(r, ns...)
	if err != nil {
		return nil, err
	}
	b, err := durable.ReadFile(d.Anchor(), trust.MaxAnchor)
	if err != nil {
		return nil, err
	}
	a, err := trust.ParseAnchor(b, true)
	if err != nil {
		return nil, err
	}
	_, err = a.OpenRecalls(signed)
	return signed, err
}

// KeyDigest is how recalls name a key of the anchor: "module", or a manifest
// key such as "manifest-1".
func KeyDigest(d datadir.Dir, name string) (string, error) {
	b, err := durable.ReadFile(d.Anchor(), trust.MaxAnchor)
	if err != nil {
		return "", err
	}
	a, err := trust.ParseAnchor(b, true)
	if err != nil {
		return "", err
	}
	if name == "module" && len(a.ModuleKeys) == 1 {
		return livepatch.KeyDigest(a.ModuleKeys[0].Modulus), nil
	}
	// While an old and a new module key overlap, each goes by its own name.
	named := slices.DeleteFunc(slices.Clone(a.ModuleKeys), func(k trust.ModuleKey) bool { return k.Name != name })
	if len(named) == 1 {
		return livepatch.KeyDigest(named[0].Modulus), nil
	}
	for _, k := range a.Manifest.Keys {
		if strings.HasPrefix(k, a.Publisher+"/"+name+"+") {
			return livepatch.KeyDigest([]byte(k)), nil
		}
	}
	return "", fault.New(fault.NotFound, "no_such_key", "the anchor has no key %.80q", name).WithHint("name one such as manifest-1; module, or where there are two module keys the name of one: klatch trust show")
}

// verifyOwn checks a new bundle as a machine would, with the anchor that
// machines have: a wrong key file is found here and not on a fleet.
func verifyOwn(d datadir.Dir, manifest, module []byte) error {
	b, err := durable.ReadFile(d.Anchor(), trust.MaxAnchor)
	if err != nil {
		return err
	}
	a, err := trust.ParseAnchor(b, true)
	if err != nil {
		return err
	}
	if _, err := a.OpenManifest(manifest); err != nil {
		return err
	}
	_, err = a.VerifyModule(module)
	return err
}

// Signed reads the bundles of a kernel that are signed, by their builds.
func Signed(d datadir.Dir, builds []build.Result) ([]build.Result, error) {
	var out []build.Result
	for _, b := range builds {
		_, err := os.Stat(BundleFile(d, b))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}
