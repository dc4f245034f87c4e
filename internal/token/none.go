// SPDX-License-Identifier: Apache-2.0

//go:build !(cgo && pkcs11)

package token

import (
	"crypto"

	"klatch/internal/fault"
)

// Open refuses: this build is static.
func Open(uri string) (crypto.Signer, error) {
	if _, err := Parse(uri); err != nil {
		return nil, err
	}
	return nil, fault.New(fault.Invalid, "no_pkcs11", "this program was built without PKCS#11").
		WithHint("build the other one: make forge-pkcs11 or make fleet-pkcs11")
}
