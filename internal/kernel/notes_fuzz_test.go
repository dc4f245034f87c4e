// SPDX-License-Identifier: Apache-2.0

package kernel_test

import (
	"bytes"
	"testing"

	"klatch/internal/kernel"
)

func FuzzParseNotes(f *testing.F) {
	note := "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00abcdefghijklmnopqrst"
	f.Add([]byte(note))
	f.Add([]byte("\x06\x00\x00\x00\x01\x00\x00\x00\x01\x01\x00\x00Linux\x00\x00\x00\x00\x00\x00\x00" + note))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\x03\x00\x00\x00GNU\x00"))
	f.Add([]byte(note[:30]))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := kernel.ParseNotes(b)
		if err == nil && !bytes.Contains(b, id[:]) {
			t.Errorf("build id %s is not in the notes", id)
		}
	})
}
