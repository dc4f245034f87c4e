// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The host's own settings are read after ours, and only the command line comes
// after those: a host that takes unsigned archives for itself must not make us
// build kernels from one.
func TestTheHostCannotTurnSignaturesOff(t *testing.T) {
	dir := t.TempDir()
	a, err := Open(filepath.Join(dir, "apt"), []Suite{{URI: "http://mirror.invalid/debian", Name: "bookworm"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte("#!/bin/sh\necho \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	out, err := a.apt(t.Context(), dir, "apt-get", "-q", "update")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"APT::Get::AllowUnauthenticated=false", "Acquire::AllowInsecureRepositories=false",
		"Acquire::AllowDowngradeToInsecureRepositories=false", "Acquire::AllowWeakRepositories=false"} {
		if !strings.Contains(string(out), "-o "+want) {
			t.Errorf("apt is called without %s: %s", want, out)
		}
	}
}
