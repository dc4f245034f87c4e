// SPDX-License-Identifier: Apache-2.0

package testkit

import (
	"os"
	"path/filepath"
	"testing"
)

// SharedEnv names the environment variable with the folder of shared data.
const SharedEnv = "KLATCH_SHARED"

// Shared is the path of a file that is shared between checkouts and is not
// part of the project, such as a snapshot of a public feed: below the folder
// that SharedEnv names, or below "shared" beside the checkout. The test is
// skipped where it is absent.
func Shared(t testing.TB, elem ...string) string {
	t.Helper()
	Need(t, "shared")
	p := filepath.Join(append([]string{sharedDir()}, elem...)...)
	if _, err := os.Stat(p); err != nil {
		t.Skipf("need the shared file %s: %v", filepath.Join(elem...), err)
	}
	return p
}

func sharedDir() string {
	if dir := os.Getenv(SharedEnv); dir != "" {
		return dir
	}
	dir, err := os.Getwd() // of a test: its package
	for err == nil && dir != filepath.Dir(dir) {
		if st, err := os.Stat(filepath.Join(dir, "shared", "cve")); err == nil && st.IsDir() {
			return filepath.Join(dir, "shared")
		}
		dir = filepath.Dir(dir)
	}
	return ""
}
