// SPDX-License-Identifier: Apache-2.0

package fault

// Wire is an Error in a message between two programs.
type Wire struct {
	Kind Kind   `json:"kind"`
	Code Code   `json:"code"`
	Text string `json:"text"`
	Hint string `json:"hint"`
}
