// SPDX-License-Identifier: Apache-2.0

// Command guestmain is the smallest program that can be a guest: tests build
// it so that they do not need klatch-forge.
package main

import (
	"os"

	"klatch/internal/forge/lab/guest"
)

func main() {
	if guest.IsInit() {
		guest.Main()
	}
	os.Exit(2)
}
