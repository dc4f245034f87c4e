// SPDX-License-Identifier: Apache-2.0

// Package efi writes what a lab machine with UEFI firmware starts from: its
// variables, and with them the keys of Secure Boot. Numbers and layouts are
// those of the UEFI specification, 2.10, and of EDK2's variable store.
//
// Read Keys first: the variables of a machine whose owner is a test. Nothing
// here runs on a machine of a fleet; what those read of their firmware is
// package bootkeys, which shares no code with this one.
package efi

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
)

// GUID is a name of sixteen bytes in the order they have on disk: the first
// three groups of its text are little-endian (UEFI 2.10, appendix A).
type GUID [16]byte

// MustGUID is for constants.
func MustGUID(text string) GUID {
	parts := strings.Split(text, "-")
	if len(parts) != 5 || len(text) != 36 {
		panic(fmt.Sprintf("GUID %q", text))
	}
	n := func(i int) uint64 {
		v, err := strconv.ParseUint(parts[i], 16, 64)
		if err != nil {
			panic(err)
		}
		return v
	}
	var g GUID
	binary.LittleEndian.PutUint32(g[0:], uint32(n(0))) //nolint:gosec // eight digits
	binary.LittleEndian.PutUint16(g[4:], uint16(n(1))) //nolint:gosec // four digits
	binary.LittleEndian.PutUint16(g[6:], uint16(n(2))) //nolint:gosec // four digits
	binary.BigEndian.PutUint16(g[8:], uint16(n(3)))    //nolint:gosec // four digits
	var tail [8]byte
	binary.BigEndian.PutUint64(tail[:], n(4))
	copy(g[10:], tail[2:])
	return g
}

// Vendors of variables, and kinds of signatures.
var (
	Global        = MustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c") // PK, KEK, Boot0000
	ImageSecurity = MustGUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f") // db, dbx
	ShimLock      = MustGUID("605dab50-e046-4300-abb6-3dd810dd8b23") // MokList

	certX509       = MustGUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
	certX509SHA256 = MustGUID("3bd2a492-96c0-4079-b420-fcf98ef103ed")
	// owner is who we say has put a key in.
	owner = MustGUID("6b6c6174-6368-4c41-8242-6b6579730001")
)

// Attributes of a variable.
const (
	nonVolatile   = 1 << 0
	bootService   = 1 << 1
	runtimeAccess = 1 << 2
	timeAuth      = 1 << 5

	ordinary = nonVolatile | bootService | runtimeAccess
	keys     = ordinary | timeAuth
)

// Variable is one variable of the firmware. Without Data it is one to take out.
type Variable struct {
	Name       string
	Vendor     GUID
	Attributes uint32
	Data       []byte
}

// Keys are the variables of a machine with Secure Boot on whose platform key
// is the first certificate: it starts what certificates of db have signed.
// All certificates are in DER.
func Keys(platform []byte, db ...[]byte) []Variable {
	return []Variable{
		{"PK", Global, keys, SignatureList(platform)},
		{"KEK", Global, keys, SignatureList(platform)},
		DB(db...),
	}
}

// DB is the list of certificates that the firmware believes.
func DB(certs ...[]byte) Variable {
	return Variable{"db", ImageSecurity, keys, SignatureList(certs...)}
}

// DBX is the list of what the firmware must not believe.
func DBX(list ...[]byte) Variable {
	var all []byte
	for _, l := range list {
		all = append(all, l...)
	}
	return Variable{"dbx", ImageSecurity, keys, all}
}

// MOK is the list of certificates that shim believes, as MokManager leaves it:
// only boot services see it, and shim shows a copy as MokListRT.
func MOK(certs ...[]byte) Variable {
	return Variable{"MokList", ShimLock, nonVolatile | bootService, SignatureList(certs...)}
}

// SignatureList holds certificates, each in a list of its own (UEFI 2.10,
// 32.4.1): entries of one list have one size.
func SignatureList(certs ...[]byte) []byte {
	var all []byte
	for _, c := range certs {
		all = append(all, signatureList(certX509, c)...)
	}
	return all
}

// RevokedCertificate is an entry of dbx that revokes a certificate by the
// SHA-256 of what was signed in it, from the beginning of time on (32.4.1,
// EFI_CERT_X509_SHA256).
func RevokedCertificate(toBeSigned [32]byte) []byte {
	return signatureList(certX509SHA256, append(toBeSigned[:], make([]byte, 16)...))
}

func signatureList(kind GUID, entry []byte) []byte {
	const header, ownerLen = 16 + 3*4, 16
	size := ownerLen + len(entry)
	b := kind[:]
	b = binary.LittleEndian.AppendUint32(b, uint32(header+size)) //nolint:gosec // a certificate is small
	b = binary.LittleEndian.AppendUint32(b, 0)                   // no header of the kind
	b = binary.LittleEndian.AppendUint32(b, uint32(size))        //nolint:gosec // as above
	b = append(b, owner[:]...)
	return append(b, entry...)
}

// Boot is the one entry of the boot menu: a program on any disk of the machine,
// with its command line (UEFI 2.10, 3.1.3). The device path is the short form,
// only the file.
func Boot(file, commandLine string) []Variable {
	path := append(ucs2(file), 0, 0)
	node := []byte{4, 4}                                               // media, file path
	node = binary.LittleEndian.AppendUint16(node, uint16(4+len(path))) //nolint:gosec // a short path
	node = append(node, path...)
	node = append(node, 0x7f, 0xff, 4, 0) // the end

	option := binary.LittleEndian.AppendUint32(nil, 1)                   // active
	option = binary.LittleEndian.AppendUint16(option, uint16(len(node))) //nolint:gosec // as above
	option = append(option, ucs2("Linux")...)
	option = append(option, 0, 0)
	option = append(option, node...)
	option = append(option, ucs2(commandLine)...)
	option = append(option, 0, 0)
	return []Variable{
		{"Boot0000", Global, ordinary, option},
		{"BootOrder", Global, ordinary, []byte{0, 0}},
	}
}

func ucs2(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
