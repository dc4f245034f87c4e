// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

// every is the distance between the calls that are disturbed.
const every = 1
