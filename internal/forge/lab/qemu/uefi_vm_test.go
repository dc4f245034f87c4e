// SPDX-License-Identifier: Apache-2.0

//go:build vm

package qemu_test

import (
	"os"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/efi"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/testkit"
)

// TestFirmwareRefuses: a kernel whose signer is not in db does not start, and
// the rig says so at once. Kernels that do start are in package e2e.
func TestFirmwareRefuses(t *testing.T) {
	testkit.Need(t, "ovmf")
	rig := newRig(t, nil)
	other, err := os.ReadFile("/usr/lib/shim/shimx64.efi.signed")
	if err != nil {
		t.Fatal(err)
	}
	signers, err := efi.Signers(other) // Microsoft's, who signs no kernel
	if err != nil || len(signers) == 0 {
		t.Fatalf("%d signers, %v", len(signers), err)
	}
	_, err = rig.Boot(t.Context(), lab.Spec{Name: "refused", Kernel: testkit.Kernel(), Firmware: &lab.Firmware{Variables: efi.Keys(signers[0], signers...)}})
	labtest.Broken(t, err)
	if err == nil || !strings.Contains(err.Error(), "starts nothing") || !strings.Contains(err.Error(), "Access Denied") {
		t.Errorf("a kernel that nobody in db signed: %v", err)
	}
}
