// SPDX-License-Identifier: Apache-2.0

package livepatch_test

import (
	"bytes"
	"testing"

	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/signed"
)

// What parses is the one form: encoding gives the same bytes again.

func FuzzParseManifest(f *testing.F) {
	m := signed.Manifest(kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}, 3, []byte("module"))
	good, err := m.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"sequence": 3`), []byte(`"sequence": 3, "sequence": 4`), 1))
	f.Add(append(bytes.Clone(good), ' '))
	f.Add([]byte(`{"format":"klatch-manifest/1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := livepatch.ParseManifest(b)
		if err != nil {
			return
		}
		if again, err := m.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q comes back as %q, %v", b, again, err)
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	good := livepatch.Bundle{Manifest: []byte("manifest"), Module: []byte("module")}.Encode()
	f.Add(good)
	f.Add(good[:20])
	f.Add(append(bytes.Clone(good), 0))
	f.Add(livepatch.Bundle{}.Encode())
	f.Add([]byte("KLATCHB1\x08manifest\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := livepatch.ParseBundle(b)
		if err == nil && !bytes.Equal(p.Encode(), b) {
			t.Errorf("%q comes back as %q", b, p.Encode())
		}
	})
}
