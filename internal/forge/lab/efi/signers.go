// SPDX-License-Identifier: Apache-2.0

package efi

import (
	"bytes"
	"crypto/x509"
	"debug/pe"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
)

// Signers are the certificates, in DER, that came with the signatures of a
// program for UEFI, such as a distribution's kernel. Nothing is verified: who
// puts them into a db says that this file is the one to believe.
func Signers(program []byte) ([][]byte, error) {
	f, err := pe.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, fmt.Errorf("read program for UEFI: %w", err)
	}
	h, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return nil, errors.New("program for UEFI is not for 64 bits")
	}
	dir := h.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_SECURITY] // an offset in the file, not an address
	if uint64(dir.VirtualAddress)+uint64(dir.Size) > uint64(len(program)) || dir.Size < 8 {
		return nil, errors.New("program for UEFI is not signed")
	}
	var certs [][]byte
	for table := program[dir.VirtualAddress : dir.VirtualAddress+dir.Size]; len(table) >= 8; {
		size := uint64(binary.LittleEndian.Uint32(table)) // WIN_CERTIFICATE of the PE format
		if size < 8 || size > uint64(len(table)) {
			return nil, fmt.Errorf("signature of %d bytes in a table of %d", size, len(table))
		}
		found, err := inPKCS7(table[8:size])
		if err != nil {
			return nil, err
		}
		certs = append(certs, found...)
		table = table[min((size+7)/8*8, uint64(len(table))):]
	}
	return certs, nil
}

// inPKCS7 are the certificates of a SignedData (RFC 2315, 9.1).
func inPKCS7(der []byte) ([][]byte, error) {
	var info struct {
		Type    asn1.ObjectIdentifier
		Content struct {
			Version    int
			Algorithms asn1.RawValue
			Signed     asn1.RawValue
			Certs      asn1.RawValue `asn1:"optional,tag:0"`
			Signatures asn1.RawValue
		} `asn1:"explicit,tag:0"`
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fmt.Errorf("signature of a program for UEFI: %w", err)
	}
	list, err := x509.ParseCertificates(info.Content.Certs.Bytes)
	if err != nil {
		return nil, fmt.Errorf("certificates in a signature: %w", err)
	}
	var certs [][]byte
	for _, c := range list {
		certs = append(certs, c.Raw)
	}
	return certs, nil
}
