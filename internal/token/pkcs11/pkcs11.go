// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package pkcs11

import (
	"crypto"
	"crypto/elliptic"
	"errors"
	"fmt"

	"github.com/ThalesGroup/crypto11"

	"klatch/internal/fault"
)

func context(module, token, pin string) (*crypto11.Context, error) {
	c, err := crypto11.Configure(&crypto11.Config{Path: module, TokenLabel: token, Pin: pin})
	if err != nil {
		return nil, fault.New(fault.Unavailable, "token", "open token %q through %s: %w", token, module, err).
			WithHint("is the token plugged in, and the PIN right? Three wrong PINs may lock it")
	}
	return c, nil
}

// Open finds a key pair by its label. The token stays open until the program
// ends.
func Open(module, token, label, pin string) (crypto.Signer, error) {
	c, err := context(module, token, pin)
	if err != nil {
		return nil, err
	}
	s, err := c.FindKeyPair(nil, []byte(label))
	if err != nil || s == nil { // crypto11 answers either way where there is none
		return nil, errors.Join(fault.New(fault.NotFound, "no_key", "token %q gives no key pair %q: %w", token, label, err), c.Close())
	}
	return s, nil
}

// Make makes a key pair inside the token: ECDSA P-256, or RSA with so many
// bits.
func Make(module, token, label, pin string, rsaBits int) (crypto.PublicKey, error) {
	c, err := context(module, token, pin)
	if err != nil {
		return nil, err
	}
	var s crypto11.Signer
	if rsaBits > 0 {
		s, err = c.GenerateRSAKeyPairWithLabel([]byte(label), []byte(label), rsaBits)
	} else {
		s, err = c.GenerateECDSAKeyPairWithLabel([]byte(label), []byte(label), elliptic.P256())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make key %q in token %q: %w", label, token, err), c.Close())
	}
	return s.Public(), c.Close()
}
