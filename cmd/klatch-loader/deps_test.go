// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestRootDependencies keeps the root program small. It is an allow list:
// adding a line needs the review that CODEOWNERS asks for this folder.
// depaware.txt lists everything linked; make lint compares it, make depaware
// writes it.
func TestRootDependencies(t *testing.T) {
	allowed := []string{
		"klatch/internal/fault", "klatch/internal/kernel", "klatch/internal/cve", "klatch/internal/livepatch",
		"klatch/internal/durable", "klatch/internal/trust",
		"klatch/internal/machine/loader", "klatch/internal/machine/loaderapi", "klatch/internal/machine/klp",
		"klatch/cmd/klatch-loader",
		"golang.org/x/mod/sumdb/note",
		"golang.org/x/sys/unix",
	}
	banned := []string{
		"net", "net/http", "net/url", "crypto/tls", "crypto/x509", "os/exec", "os/user", "plugin",
		"encoding/gob", "text/template", "html/template", "database/sql", "archive/tar", "compress/gzip",
	}
	list := exec.Command("go", "list", "-deps", "-f", "{{.Standard}} {{.ImportPath}}", ".")
	list.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		std, path, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case std != "true" && !slices.Contains(allowed, path):
			t.Errorf("the loader links %s, which is not on the allow list", path)
		case std == "true" && slices.Contains(banned, path):
			t.Errorf("the loader links %s", path)
		}
	}
}
