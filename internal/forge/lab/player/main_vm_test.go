// SPDX-License-Identifier: Apache-2.0

//go:build vm

package player_test

import (
	"os"
	"testing"

	"klatch/internal/forge/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}
