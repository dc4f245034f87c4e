// SPDX-License-Identifier: Apache-2.0

//go:build vm

package qemu_test

import (
	"os"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/efi"
	"klatch/internal/testkit"
)

// TestSecureBoot starts a distribution's kernel, as it is signed, from firmware
// whose keys were made by the test.
func TestSecureBoot(t *testing.T) {
	testkit.Need(t, "ovmf")
	rig := newRig(t, nil)
	image, err := os.ReadFile(testkit.Kernel())
	if err != nil {
		t.Fatal(err)
	}
	signers, err := efi.Signers(image)
	if err != nil || len(signers) == 0 {
		t.Fatalf("%d signers, %v", len(signers), err)
	}
	m, err := rig.Boot(t.Context(), lab.Spec{Name: "secure", Kernel: testkit.Kernel(), Firmware: &lab.Firmware{Variables: efi.Keys(signers[0], signers[0])}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	res, err := m.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c", "cat /sys/kernel/security/lockdown /sys/module/module/parameters/sig_enforce; dmesg | grep -iE 'secure|integrity|lockdown|X.509|efi:'; cat /proc/keys; cat /proc/cmdline"}})
	if err != nil || !strings.Contains(string(res.Stdout), "[integrity]") {
		t.Errorf("%v: %s%s", err, res.Stdout, res.Stderr)
	}
	t.Logf("%s", res.Stdout)
}
