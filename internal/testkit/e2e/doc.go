// SPDX-License-Identifier: Apache-2.0

// Package e2e runs the real programs, as packaged, on a stock Debian kernel in
// a Debian guest with systemd: what only the whole can show. Its tests have the
// build tag vm. They need root, QEMU and apt; the kernel, its source and the
// guest's image come from the cache, or from the distribution's archive.
//
// Start with newStory in story_test.go: a publisher with real livepatches of
// two real fixes, a klatch-server process, and a machine. The fixes are taken
// from source packages while a test runs; no kernel code is in this
// repository.
package e2e
