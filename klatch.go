// SPDX-License-Identifier: Apache-2.0

// Package klatch is the root of the module: six programs that take a kernel
// fix to a patched, reported machine. Start with README.md for what it is,
// ARCHITECTURE.md for how it hangs together.
package klatch
