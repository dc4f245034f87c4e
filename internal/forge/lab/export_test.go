// SPDX-License-Identifier: Apache-2.0

package lab

import "regexp"

// Classify and ClassifySlow give the kind of a line with and without hints.
func Classify(text string) TroubleKind { return classify(text) }

// ClassifySlow tries every expression.
func ClassifySlow(text string) TroubleKind {
	if fine.MatchString(text) {
		return ""
	}
	if regexp.MustCompile(`^livepatch: `).MatchString(text) {
		if livepatchFine.MatchString(text) {
			return ""
		}
		return Livepatch
	}
	for _, r := range rules {
		if r.re.MatchString(text) {
			return r.kind
		}
	}
	return ""
}

// Said is what the kernel says in a line.
func Said(line string) (string, bool) { return said(line) }
