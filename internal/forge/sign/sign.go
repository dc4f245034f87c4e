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
	"strings"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/proof"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
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

// Sign signs a built and tested livepatch and writes its bundle. It refuses
// what was not tested, or not as these bytes. Signing again gives the same
// bundle: neither signature holds a time or a random number.
func Sign(d datadir.Dir, b build.Result) (livepatch.Manifest, error) {
	var m livepatch.Manifest
	dir := build.Dir(d.Path, b.Kernel, b.Sequence)
	tested, err := proof.Read(dir, b)
	if err != nil {
		return m, err
	}
	raw, err := durable.ReadFile(b.Module.Path, livepatch.MaxModule)
	if err != nil {
		return m, err
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != b.Module.SHA256 {
		return m, fault.New(fault.Untrusted, "module_digest", "module %s is not the one that was built", b.Module.Path).
			WithHint("build again: klatch-forge build --kernel %s", b.Kernel)
	}
	mk, err := moduleKey(d)
	if err != nil {
		return m, err
	}
	key, err := readKey(moduleKeyFile(d))
	if err != nil {
		return m, err
	}
	signed, err := trust.AppendModuleSignature(raw, mk, key, rand.Reader)
	if err != nil {
		return m, err
	}
	s256, s512 := sha256.Sum256(signed), sha512.Sum512(signed)
	m = livepatch.Manifest{Format: livepatch.ManifestFormat, Kernel: b.KernelBuild(), Sequence: b.Sequence,
		Module: livepatch.Module{Name: b.Sequence.ModuleName(), Bytes: int64(len(signed)),
			SHA256: hex.EncodeToString(s256[:]), SHA512: hex.EncodeToString(s512[:])},
		Fixes: tested.Fixes, Functions: b.Functions}
	signers, err := manifestSigners(d)
	if err != nil {
		return m, err
	}
	var ns []note.Signer
	for _, s := range signers {
		ns = append(ns, s)
	}
	manifest, err := trust.SignManifest(m, ns...)
	if err != nil {
		return m, err
	}
	if err := verifyOwn(d, manifest, signed); err != nil {
		return m, err
	}
	if err := durable.WriteFile(filepath.Join(dir, signedModule), signed, 0o644); err != nil {
		return m, err
	}
	return m, durable.WriteFile(filepath.Join(dir, bundleFile), livepatch.Bundle{Manifest: manifest, Module: signed}.Encode(), 0o644)
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
