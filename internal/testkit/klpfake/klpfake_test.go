// SPDX-License-Identifier: Apache-2.0

package klpfake_test

import (
	"testing"
	"time"

	"klatch/internal/kernel"
	"klatch/internal/testkit/klpfake"
	"klatch/internal/testkit/klptest"
)

func TestConformance(t *testing.T) {
	b := kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}
	k, err := klpfake.New(t.TempDir(), b, "boot-1")
	if err != nil {
		t.Fatal(err)
	}
	klptest.Run(t, klptest.Fixture{
		Kernel:   k,
		First:    klpfake.Module(klpfake.Words(b, 1)),
		Second:   klpfake.Module(klpfake.Words(b, 2)),
		Patience: 5 * time.Second,
	})
}
