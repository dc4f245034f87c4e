// SPDX-License-Identifier: Apache-2.0

package publish

import (
	"encoding/json"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/notice"
)

// FuzzCustom: the custom part of a target is either read, or it is said that
// it cannot be; what is read says for whom the livepatch is.
func FuzzCustom(f *testing.F) {
	good, err := json.Marshal(livepatch.Listed{Format: livepatch.ListedFormat, Kernel: kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}, Sequence: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"format":"` + notice.Format + `"}`))
	f.Add([]byte("null"))
	all := livepatch.Recalls{Floors: []livepatch.Floor{{Kernel: kernel.BuildID{1}, Sequence: 2}}}
	f.Fuzz(func(t *testing.T, raw []byte) {
		taken, err := recalled(all, raw)
		if err != nil {
			if fault.CodeOf(err) != "custom_unreadable" || taken {
				t.Errorf("%v, %v", taken, err)
			}
			return
		}
		var c livepatch.Listed
		if raw == nil || json.Unmarshal(raw, &c) != nil || c.Format == notice.Format {
			return
		}
		if want := c.Kernel.ID == (kernel.BuildID{1}) && c.Sequence < 2; taken != want {
			t.Errorf("%s: %v, want %v", raw, taken, want)
		}
	})
}
