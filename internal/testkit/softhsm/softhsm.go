// SPDX-License-Identifier: Apache-2.0

// Package softhsm makes a SoftHSM token for one test: PKCS#11 as hardware
// tokens speak it, with its store in a temporary folder. Tests only.
package softhsm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"klatch/internal/durable"
	"klatch/internal/testkit"
)

// HSM is a token and how to open it.
type HSM struct {
	Module, Token, PIN string
	PINFile            string
	Conf               string // for SOFTHSM2_CONF of other processes
}

// New makes a token, and sets the environment so that this process finds it.
func New(t testing.TB) HSM {
	t.Helper()
	testkit.Need(t, "softhsm")
	dir := t.TempDir()
	h := HSM{Module: testkit.SoftHSM(), Token: "klatch test", PIN: "987654", PINFile: filepath.Join(dir, "pin"), Conf: filepath.Join(dir, "softhsm2.conf")}
	tokens := filepath.Join(dir, "tokens")
	for _, err := range []error{
		os.Mkdir(tokens, 0o700),
		durable.WriteFile(h.Conf, fmt.Appendf(nil, "directories.tokendir = %s\nlog.level = ERROR\n", tokens), 0o600),
		durable.WriteFile(h.PINFile, []byte(h.PIN+"\n"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("SOFTHSM2_CONF", h.Conf)
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", h.Token, "--pin", h.PIN, "--so-pin", "123456").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return h
}
