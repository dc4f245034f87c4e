// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/wire"
)

// What went wrong inside is for the log, not for whoever asks.
func TestInternalErrorsStayInside(t *testing.T) {
	for _, err := range []error{
		errors.New("open /var/lib/klatch-server/klatch.db: disk I/O error"),
		fault.New(fault.Internal, "key_mismatch", "open /var/lib/klatch-server/ca.key").WithHint("klatch.db"),
	} {
		w := httptest.NewRecorder()
		new(API).problem(w, err)
		if b := w.Body.String(); w.Code != 500 || strings.Contains(b, "klatch.db") || strings.Contains(b, "ca.key") || strings.Contains(b, "key_mismatch") {
			t.Errorf("status %d: %s", w.Code, b)
		}
	}
}

// What cannot be read may hold a token: the answer and the log name no part.
func TestUnreadableBodyIsNotQuoted(t *testing.T) {
	for _, body := range []string{`{"token":["klatch1.secret.x"]}`, `klatch1.secret.x`, `{"token":"klatch1.secret.x"`, `{"klatch1.secret.x":1,"facts":7}`} {
		var q wire.EnrollRequest
		err := read(httptest.NewRequest("POST", "/v1/enroll", strings.NewReader(body)), &q)
		if fault.CodeOf(err) != "bad_body" || strings.Contains(err.Error(), "klatch1") || strings.Contains(err.Error(), "invalid character") {
			t.Errorf("%s: %v", body, err)
		}
	}
}
