// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"

	"klatch/internal/fault"
)

// ModuleMarker ends a signed module. Its form (include/linux/module_signature.h and
// scripts/sign-file.c of the kernel): the module, a CMS SignedData in DER
// (RFC 5652; detached, no attributes, no certificates), a 12-byte trailer,
// and this line.
const ModuleMarker = "~Module signature appended~\n"

const (
	trailerLen   = 12
	pkcs7Type    = 2        // PKEY_ID_PKCS7, the only id_type the kernel takes
	maxSignature = 16 << 10 // RSA-8192 and a long issuer stay below
)

// VerifyModule checks the module signature against the anchor's keys. It does
// not parse CMS: it builds the one encoding that each key could have made
// around the signature bytes and compares, so no lenient parser decides. It
// returns the module without its signature.
//
// The kernel checks again, but only under enforcement: without lockdown or
// sig_enforce it loads an unsigned module or one by an unknown key and merely
// taints itself (kernel/module/signing.c, module_sig_check).
func (a *Anchor) VerifyModule(signed []byte) ([]byte, error) {
	rest, ok := bytes.CutSuffix(signed, []byte(ModuleMarker))
	if !ok {
		return nil, fault.New(fault.Untrusted, "module_unsigned", "module has no signature at its end")
	}
	if len(rest) < trailerLen {
		return nil, fault.New(fault.Untrusted, "module_signature_malformed", "module signature has no trailer")
	}
	rest, trailer := rest[:len(rest)-trailerLen], rest[len(rest)-trailerLen:]
	size := binary.BigEndian.Uint32(trailer[8:])
	if !bytes.Equal(trailer[:8], []byte{0, 0, pkcs7Type, 0, 0, 0, 0, 0}) || size > maxSignature || int(size) >= len(rest) {
		return nil, fault.New(fault.Untrusted, "module_signature_malformed", "module signature has a bad trailer")
	}
	module, cms := rest[:len(rest)-int(size)], rest[len(rest)-int(size):]
	if bytes.HasSuffix(module, []byte(ModuleMarker)) {
		return nil, fault.New(fault.Untrusted, "module_signature_malformed", "module is signed twice")
	}
	digest := sha256.Sum256(module)
	for _, k := range a.ModuleKeys {
		pub, err := k.publicKey()
		if err != nil {
			return nil, err
		}
		if len(cms) < pub.Size() {
			continue
		}
		sig := cms[len(cms)-pub.Size():] // the signature is the last field
		if !bytes.Equal(cms, k.CMS(sig)) {
			continue
		}
		if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], sig); err != nil {
			return nil, fault.New(fault.Untrusted, "module_signature_bad", "module signature by key %s: %w", k.Name, err)
		}
		return module, nil
	}
	return nil, fault.New(fault.Untrusted, "module_key_unknown", "module is signed by no key of publisher %s", a.Publisher)
}

// DER of the fixed parts. Object identifiers: RFC 5652 (CMS), RFC 8017
// (rsaEncryption), RFC 5754 (SHA-256; parameters absent).
var (
	oidSignedData = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x02}
	oidData       = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01}
	algSHA256     = der(0x30, []byte{0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01})
	algRSA        = der(0x30, []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01}, []byte{0x05, 0x00})
	versionOne    = []byte{0x02, 0x01, 0x01}
)

// CMS is the ContentInfo around one signature.
func (k ModuleKey) CMS(sig []byte) []byte {
	signerInfo := der(0x30, versionOne, der(0x30, k.Issuer, k.Serial), algSHA256, algRSA, der(0x04, sig))
	signedData := der(0x30, versionOne, der(0x31, algSHA256), der(0x30, oidData), der(0x31, signerInfo))
	return der(0x30, oidSignedData, der(0xa0, signedData))
}

// der writes one tag-length-value in the definite, shortest form (X.690, 10.1).
func der(tag byte, parts ...[]byte) []byte {
	body := bytes.Join(parts, nil)
	n := len(body)
	out := []byte{tag}
	switch {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	default: // maxSignature keeps it below 0x10000
		out = append(out, 0x82, byte(n>>8), byte(n)) //nolint:gosec // two bytes are meant
	}
	return append(out, body...)
}
