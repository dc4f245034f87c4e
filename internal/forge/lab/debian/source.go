// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// source is where a suite comes from.
type source struct {
	mirror  string // base URL
	keyring string // file that debootstrap checks the suite's signature with
}

// archiveKeyring is what package debian-archive-keyring installs; apt uses
// the same keys when its configuration names no keyring.
const archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// findSource asks this machine's apt where it gets the suite from.
func findSource(ctx context.Context, suite string) (source, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets",
		"--format", targetFormat, "Created-By: Packages", "Component: main").Output()
	if err != nil {
		return source{}, fmt.Errorf("ask apt for its index targets: %w", err)
	}
	src, err := parseTargets(out, suite)
	if err != nil {
		return source{}, err
	}
	if src.keyring == "" {
		src.keyring = archiveKeyring
	}
	if _, err := os.Stat(src.keyring); err != nil {
		return source{}, fmt.Errorf("keyring of %s: %w", suite, err)
	}
	return src, nil
}

// targetFormat: a field that apt does not know stays as it is written.
const targetFormat = "$(CODENAME)\t$(RELEASE)\t$(SITE)\t$(SIGNED_BY)"

// parseTargets finds the suite in apt's answer. apt prints unknown fields
// unexpanded, and a keyring may be given as key ids, which debootstrap
// cannot use.
func parseTargets(out []byte, suite string) (source, error) {
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		f := strings.Split(lines.Text(), "\t")
		if len(f) != 4 || (f[0] != suite && f[1] != suite) || strings.HasPrefix(f[2], "$(") {
			continue
		}
		src := source{mirror: f[2]}
		if filepath.IsAbs(f[3]) {
			src.keyring = f[3]
		}
		return src, nil
	}
	return source{}, fmt.Errorf("apt of this machine has no source for suite %s", suite)
}
