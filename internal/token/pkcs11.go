// SPDX-License-Identifier: Apache-2.0

//go:build cgo && pkcs11

package token

import (
	"crypto"

	"klatch/internal/token/pkcs11"
)

// Open opens a key in a token.
func Open(uri string) (crypto.Signer, error) {
	u, err := Parse(uri)
	if err != nil {
		return nil, err
	}
	pin, err := u.ReadPIN()
	if err != nil {
		return nil, err
	}
	return pkcs11.Open(u.Module, u.Token, u.Object, pin)
}
