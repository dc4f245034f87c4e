// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"

	"klatch/internal/wire"
)

// leftOut says to a person why a signed livepatch for this kernel build is not
// offered. The words are the server's, the sentences are ours: a server cannot
// put text into a machine's status. What a signed list names and a server does
// not hand out cannot be told from a server that withholds it.
func leftOut(answer wire.CheckAnswer) string {
	if answer.Absent == "" {
		return ""
	}
	return "a livepatch is signed, but this machine's server leaves it out: " + cmp.Or(map[string]string{
		"filter":       "its filter does not let this kernel through",
		"age":          "it is younger than the server's minimum age",
		"age_unknown":  "the server has a minimum age, and the publisher's list does not say how old it is",
		"upstream":     "the mirror that the server copies from leaves it out",
		"not_imported": "it was not in the file that the server imported",
	}[answer.Absent], "for a reason that this version does not know")
}
