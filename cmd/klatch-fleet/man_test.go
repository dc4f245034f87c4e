// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"testing"

	"klatch/internal/testkit/mantest"
)

//go:generate go test -run TestManPages . -update

var update = flag.Bool("update", false, "write the man pages")

func TestManPages(t *testing.T) { mantest.Check(t, newRoot(), "../../dist/man/fleet", *update) }
