// SPDX-License-Identifier: Apache-2.0

package lab

import "klatch/internal/forge/lab/efi"

// Firmware makes a machine start as a real one does: from UEFI firmware that
// reads a boot disk, with Secure Boot where the variables say so.
type Firmware struct {
	// Variables are put into the firmware's store before the first start.
	Variables []efi.Variable
	// Shim and Grub are the programs of a distribution through which the
	// kernel starts, paths on the publisher's side. Without them the firmware
	// starts the kernel itself.
	Shim, Grub string
	// Store is a file with the store that the machine begins with; the
	// driver's empty one when it is empty.
	Store string
}

// Flasher is a Machine with firmware whose owner can change variables.
type Flasher interface {
	// Flash changes variables at the next Reboot, Reset or PowerCut.
	Flash(changes ...efi.Variable)
}
