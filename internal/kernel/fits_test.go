// SPDX-License-Identifier: Apache-2.0

package kernel_test

import (
	"testing"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// With MODVERSIONS the kernel compares none of these itself.
func TestFitsOneBuildOnly(t *testing.T) {
	good := kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}
	for _, c := range []struct {
		name   string
		change func(want, running *kernel.Build)
		code   fault.Code
	}{
		{"the same", func(_, _ *kernel.Build) {}, ""},
		{"the kernel does not know its distro", func(want, _ *kernel.Build) { want.Distro = "debian-12" }, ""},
		{"another build", func(want, _ *kernel.Build) { want.ID[19] = 1 }, "wrong_build"},
		{"another release", func(want, _ *kernel.Build) { want.Release = "6.1.0-51-amd64" }, "wrong_release"},
		{"another architecture", func(want, _ *kernel.Build) { want.Arch = "arm64" }, "wrong_arch"},
		{"nobody knows either build", func(want, running *kernel.Build) { want.ID, running.ID = kernel.BuildID{}, kernel.BuildID{} }, "build_unknown"},
	} {
		want, running := good, good
		c.change(&want, &running)
		if err := kernel.Fits(want, running); fault.CodeOf(err) != c.code || (err == nil) != (c.code == "") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
