// SPDX-License-Identifier: Apache-2.0

// Package pkcs11 talks to a PKCS#11 token through the vendor's library. It
// needs cgo and is linked only into a klatch-forge built with the tag pkcs11.
package pkcs11
