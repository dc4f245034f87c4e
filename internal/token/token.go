// SPDX-License-Identifier: Apache-2.0

// Package token opens private keys in PKCS#11 tokens. The code that talks to
// a token needs cgo and the vendor's library; it is package pkcs11 below, and
// only programs built with the tag pkcs11 have it (make forge-pkcs11, make
// fleet-pkcs11). The static ones say so.
package token

import (
	"fmt"
	"net/url"
	"os"
	"strings"

	"klatch/internal/fault"
)

// URI is a key in a token, as RFC 7512 writes it.
type URI struct {
	Token  string // label of the token
	Object string // label of the key
	Module string // the vendor's library
	PIN    string // file with the PIN
}

// Parse reads pkcs11:token=T;object=K?module-path=FILE&pin-source=file:FILE.
// Other attributes are refused: to pass over one could mean another key.
func Parse(s string) (URI, error) {
	var u URI
	bad := func(format string, args ...any) (URI, error) {
		return u, fault.New(fault.Invalid, "bad_token_uri", "token key: "+format, args...).
			WithHint("write pkcs11:token=LABEL;object=LABEL?module-path=FILE&pin-source=file:FILE")
	}
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok || len(s) > 4096 {
		return bad("%.80q is not a PKCS#11 URI", s)
	}
	path, query, _ := strings.Cut(rest, "?")
	attrs := append(strings.Split(path, ";"), strings.FieldsFunc(query, func(r rune) bool { return r == '&' })...)
	for _, a := range attrs {
		name, value, _ := strings.Cut(a, "=")
		v, err := url.PathUnescape(value)
		to, known := map[string]*string{"token": &u.Token, "object": &u.Object, "module-path": &u.Module, "pin-source": &u.PIN}[name]
		switch {
		case err != nil:
			return bad("%w", err)
		case name == "pin-value":
			return bad("a PIN does not belong into a file that is copied around")
		case !known || *to != "":
			return bad("attribute %.40q", name)
		}
		*to = v
	}
	u.PIN = strings.TrimPrefix(u.PIN, "file:")
	if u.Token == "" || u.Object == "" || u.Module == "" || u.PIN == "" {
		return bad("token, object, module-path and pin-source are all needed")
	}
	return u, nil
}

// ReadPIN reads the PIN's file.
func (u URI) ReadPIN() (string, error) {
	b, err := os.ReadFile(u.PIN)
	if err != nil {
		return "", fmt.Errorf("read PIN: %w", err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line, nil
}
