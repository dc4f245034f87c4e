// SPDX-License-Identifier: Apache-2.0

// Package trustsign is the publisher's side of package trust: it signs
// manifests, recalls and modules, and writes anchors. It is apart so that the
// root program, which only verifies, holds none of it.
package trustsign

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"io"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

// Manifest encodes and signs a manifest. The signature is over the text
// itself, so a signer sees what it signs.
func Manifest(m livepatch.Manifest, signers ...note.Signer) ([]byte, error) {
	text, err := m.Encode()
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: string(text)}, signers...)
}

// Recalls encodes and signs recalls, with the keys of manifests.
func Recalls(r livepatch.Recalls, signers ...note.Signer) ([]byte, error) {
	text, err := r.Encode()
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: string(text)}, signers...)
}

// pkcs7Type is PKEY_ID_PKCS7, the only id_type that the kernel takes.
const pkcs7Type = 2

// Module signs a module as the kernel's sign-file does: SHA-256 and RSA PKCS
// #1 v1.5, signer named by issuer and serial number. The output is byte for
// byte that of sign-file.
func Module(module []byte, k trust.ModuleKey, signer crypto.Signer, random io.Reader) ([]byte, error) {
	digest := sha256.Sum256(module)
	sig, err := signer.Sign(random, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	cms := k.CMS(sig)
	out := append(bytes.Clone(module), cms...)
	out = append(out, 0, 0, pkcs7Type, 0, 0, 0, 0, 0)
	out = binary.BigEndian.AppendUint32(out, uint32(len(cms))) //nolint:gosec // a few hundred bytes
	return append(out, trust.ModuleMarker...), nil
}

// Anchor writes an anchor file.
func Anchor(a trust.Anchor) ([]byte, error) {
	a.Format = trust.AnchorFormat
	b, err := json.MarshalIndent(a, "", " ")
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}
