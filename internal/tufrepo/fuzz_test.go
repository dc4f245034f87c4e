// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"bytes"
	"testing"
)

// FuzzDraft: a holder's machine reads a file that came from anywhere. Whatever
// is taken can be read out, asked what it lacks, and signed, without a crash.
func FuzzDraft(f *testing.F) {
	dir, keys := f.TempDir(), testKeys()
	keys.Release.Signers = signers("release", 3)
	if _, err := Init(f.Context(), dir, keys, start); err != nil {
		f.Fatal(err)
	}
	if _, err := Publish(f.Context(), dir, Publication{Roles: []ReleaseRole{release(3)}}, keys, start); err != nil {
		f.Fatal(err)
	}
	for _, c := range []Change{{Renew: []string{"root", "targets"}}, {Renew: []string{"debian-12-amd64"}}} {
		d, err := Prepare(f.Context(), dir, c, start)
		if err != nil {
			f.Fatal(err)
		}
		b, err := d.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		for _, old := range []string{`"targets": {`, `"keys": {`, `"roles": {`} {
			f.Add(bytes.Replace(b, []byte(old), []byte(old+`"x": null,`), 1))
			f.Add(bytes.Replace(b, []byte(old), []byte(`"none": {`), 1))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDraft(b)
		if err != nil {
			return
		}
		if _, err := d.Words(); err != nil {
			t.Error(err)
		}
		if _, err := d.Missing(); err != nil {
			t.Error(err)
		}
		if _, err := d.Sign(keys.Root.Signers[0]); err != nil {
			t.Error(err)
		}
	})
}
