// SPDX-License-Identifier: Apache-2.0

//go:build vm

package klp_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/machine/klp"
	"klatch/internal/testkit/klptest"
)

// TestConformance changes the running kernel. Build it with go test -c -tags
// vm and run it as root in a guest; KLATCH_KLP_FIXTURES names a folder with
// klatch_1.ko and klatch_2.ko, built for the guest's kernel, the second with
// replace set.
func TestConformance(t *testing.T) {
	dir := os.Getenv("KLATCH_KLP_FIXTURES")
	if dir == "" {
		t.Skip("need KLATCH_KLP_FIXTURES, in a guest")
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	klptest.Run(t, klptest.Fixture{
		Kernel:   klp.Running(),
		First:    read("klatch_1.ko"),
		Second:   read("klatch_2.ko"),
		Patience: time.Minute,
	})
}
