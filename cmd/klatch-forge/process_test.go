// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"testing"

	"klatch/internal/forge/lab/guest"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit/evidencesim"
)

// asProgram in the environment makes the test's own binary klatch-forge.
const asProgram = "KLATCH_TEST_AS_FORGE"

// TestMain is klatch-forge itself where a test starts it as a process.
func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	if guest.IsInit() {
		guest.Main()
	}
	sandbox.Child()
	code := m.Run()
	evidencesim.Remove()
	os.Exit(code)
}

// program runs klatch-forge as a process of its own.
func program(t *testing.T, args ...string) (stdout, stderr string, exit int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), said.String(), failed.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), said.String(), 0
}
