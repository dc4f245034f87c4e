// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"testing"

	"klatch/internal/fault"
)

// TestAReviewerIsSomebodyElse: whoever cannot be told from the author is not
// somebody else.
func TestAReviewerIsSomebodyElse(t *testing.T) {
	bob := Signer{Name: "bob-2026", Also: []string{"bob@example.org"}}
	const alice = "Alice Example <alice@example.org>"
	for _, c := range []struct {
		name     string
		reviewer Signer
		author   string
		want     fault.Code
	}{
		{"somebody else", bob, alice, ""},
		{"the author", bob, "Bob Example <bob@example.org>", "self_review"},
		{"the author with a tag", bob, "Bob Example <bob+kernel@example.org>", "self_review"},
		{"the author in capitals", bob, "B. Example <BOB@EXAMPLE.ORG>", "self_review"},
		{"one of two authors", bob, alice + ", Bob Example <bob@example.org>", "no_author"},
		{"an author without an address", bob, "Bob Example", "no_author"},
		{"nobody", bob, "", "no_author"},
		{"a reviewer without an address", Signer{Name: "bob-2026"}, alice, "self_review"},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := checker{}
			check.report.Sources = []Source{{Name: "fix", Author: c.author}}
			if err := check.somebodyElse(c.reviewer); fault.CodeOf(err) != c.want {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
