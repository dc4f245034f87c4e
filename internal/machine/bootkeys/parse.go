// SPDX-License-Identifier: Apache-2.0

package bootkeys

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"fmt"
)

// Limits of one variable. A dbx of 2026 has 24 KiB, a db of a laptop 4 KiB and
// four certificates.
const (
	maxVariable = 512 << 10
	maxLists    = 4096
	maxEntries  = 16384
)

// Certificate is one entry. Parsed is nil where Go's parser, which is stricter
// than firmware, does not read it.
type Certificate struct {
	DER    []byte
	Parsed *x509.Certificate
	key    *rsa.PublicKey
}

// List is what a variable with signature lists says, as far as it is about
// certificates. Digests of programs are counted only.
type List struct {
	Certificates []Certificate
	Revoked      [][32]byte // SHA-256 of what was signed in a certificate
	Others       int
}

// Kinds of signatures (UEFI 2.10, 32.4.1), as they lie on disk.
const (
	kindX509       = "\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72"
	kindX509SHA256 = "\x92\xa4\xd2\x3b\xc0\x96\x79\x40\xb4\x20\xfc\xf9\x8e\xf1\x03\xed"
)

// ParseList reads the signature lists of a variable: type, three lengths, a
// header, entries of one size that begin with sixteen bytes about who put them
// there.
func ParseList(b []byte) (List, error) {
	const header, owner = 16 + 3*4, 16
	var l List
	if len(b) > maxVariable {
		return l, fmt.Errorf("signature lists of %d bytes, limit %d", len(b), maxVariable)
	}
	entries := 0
	for n := 0; len(b) > 0; n++ {
		if n == maxLists {
			return l, fmt.Errorf("more than %d signature lists", maxLists)
		}
		if len(b) < header {
			return l, fmt.Errorf("signature list is cut off after %d bytes", len(b))
		}
		size, skip, each := uint64(binary.LittleEndian.Uint32(b[16:])), uint64(binary.LittleEndian.Uint32(b[20:])), uint64(binary.LittleEndian.Uint32(b[24:]))
		if size > uint64(len(b)) || header+skip > size || each <= owner || (size-header-skip)%each != 0 {
			return l, fmt.Errorf("signature list of %d bytes in %d, header of %d, entries of %d", size, len(b), skip, each)
		}
		kind, body := string(b[:16]), b[header+skip:size]
		b = b[size:]
		for ; len(body) > 0; body = body[each:] {
			if entries++; entries > maxEntries {
				return l, fmt.Errorf("more than %d signatures", maxEntries)
			}
			switch entry := body[owner:each]; {
			case kind == kindX509:
				l.Certificates = append(l.Certificates, certificate(entry))
			case kind == kindX509SHA256 && len(entry) == 32+16:
				l.Revoked = append(l.Revoked, [32]byte(entry[:32]))
			default:
				l.Others++
			}
		}
	}
	return l, nil
}

func certificate(der []byte) Certificate {
	c := Certificate{DER: der}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return c
	}
	c.Parsed = parsed
	c.key, _ = parsed.PublicKey.(*rsa.PublicKey) // another algorithm is never a module key of ours
	return c
}
