// SPDX-License-Identifier: Apache-2.0

// Package fault names the kinds of error that somebody acts on. A kind is
// given where the error is born; exit status, HTTP status and whether a retry
// helps are derived from it in one table, here and nowhere else.
//
// Most errors need no kind: an error without one is internal.
package fault

import (
	"errors"
	"fmt"
)

// Kind says what the receiver of an error can do about it.
type Kind string

// The kinds. Their spelling is stored and sent: never rename one.
const (
	Invalid     Kind = "invalid"     // the caller asked for something impossible
	NotFound    Kind = "not_found"   // the thing does not exist
	Conflict    Kind = "conflict"    // the present state forbids it; read again
	Denied      Kind = "denied"      // the caller may not
	Untrusted   Kind = "untrusted"   // a signature, digest or freshness check said no
	Unavailable Kind = "unavailable" // try again later
	Internal    Kind = "internal"    // our bug or a broken machine
)

var table = map[Kind]struct {
	exit, http int
	retry      bool
}{
	Invalid:     {2, 400, false},
	NotFound:    {3, 404, false},
	Conflict:    {3, 409, false},
	Denied:      {3, 403, false},
	Untrusted:   {3, 422, false},
	Unavailable: {75, 503, true},
	Internal:    {1, 500, false},
}

// Code is a stable machine-readable reason inside a kind, in snake_case, such
// as "wrong_build". The empty code means that nobody tells cases apart.
type Code string

// Error is an error with a kind, and perhaps a code and a hint.
type Error struct {
	Kind Kind
	Code Code
	Text string // what was tried on what
	Hint string // what the reader should do, one sentence; may be empty
	Err  error  // cause; may be nil
}

// Error is the text; New has already put the cause's text into it.
func (e *Error) Error() string { return e.Text }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// New makes an error of a kind. The format may hold one %w, whose error stays
// reachable for errors.Is and errors.As.
func New(k Kind, c Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: k, Code: c, Text: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint returns the error with a hint on what to do.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// KindOf returns the kind of the first Error in the chain. An error without
// one is Internal; nil has the empty kind.
func KindOf(err error) Kind {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// CodeOf returns the first code in the chain that is not empty.
func CodeOf(err error) Code {
	for err != nil {
		e, ok := errors.AsType[*Error](err)
		if !ok {
			return ""
		}
		if e.Code != "" {
			return e.Code
		}
		err = e.Err
	}
	return ""
}

// HintOf returns the first hint in the chain that is not empty.
func HintOf(err error) string {
	for err != nil {
		e, ok := errors.AsType[*Error](err)
		if !ok {
			return ""
		}
		if e.Hint != "" {
			return e.Hint
		}
		err = e.Err
	}
	return ""
}

// ExitStatus is the exit status of a program that ends with this error.
func ExitStatus(err error) int {
	if err == nil {
		return 0
	}
	return table[KindOf(err)].exit
}

// HTTPStatus is the status of an HTTP answer that carries this error.
func HTTPStatus(err error) int {
	if err == nil {
		return 200
	}
	return table[KindOf(err)].http
}

// Retry says whether the same attempt may work later.
func Retry(err error) bool { return table[KindOf(err)].retry }
