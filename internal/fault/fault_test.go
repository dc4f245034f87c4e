// SPDX-License-Identifier: Apache-2.0

package fault

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestKindSurvivesWrapping(t *testing.T) {
	inner := New(Untrusted, "digest_mismatch", "module of 12 bytes: %w", io.ErrUnexpectedEOF).WithHint("download it again")
	err := fmt.Errorf("load livepatch 7: %w", inner)
	if got, want := err.Error(), "load livepatch 7: module of 12 bytes: unexpected EOF"; got != want {
		t.Errorf("text %q, want %q", got, want)
	}
	if KindOf(err) != Untrusted || CodeOf(err) != "digest_mismatch" || HintOf(err) != "download it again" {
		t.Errorf("kind %q, code %q, hint %q", KindOf(err), CodeOf(err), HintOf(err))
	}
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error("the cause is not reachable")
	}
	outer := New(Unavailable, "", "check: %w", err)
	if KindOf(outer) != Unavailable || CodeOf(outer) != "digest_mismatch" {
		t.Errorf("the outer kind wins and the inner code is found: got %q, %q", KindOf(outer), CodeOf(outer))
	}
}

func TestEveryKindHasItsStatus(t *testing.T) {
	for _, c := range []struct {
		kind       Kind
		exit, http int
		retry      bool
	}{
		{Invalid, 2, 400, false}, {NotFound, 3, 404, false}, {Conflict, 3, 409, false},
		{Denied, 3, 403, false}, {Untrusted, 3, 422, false}, {Unavailable, 75, 503, true}, {Internal, 1, 500, false},
	} {
		err := New(c.kind, "", "x")
		if ExitStatus(err) != c.exit || HTTPStatus(err) != c.http || Retry(err) != c.retry {
			t.Errorf("%s: exit %d, HTTP %d, retry %v", c.kind, ExitStatus(err), HTTPStatus(err), Retry(err))
		}
	}
	if ExitStatus(errors.New("plain")) != 1 || ExitStatus(nil) != 0 {
		t.Error("an error without a kind is internal; no error is status 0")
	}
}
