// SPDX-License-Identifier: Apache-2.0

// Package mantest keeps committed man pages equal to the help texts of a
// program's commands.
package mantest

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Check compares one page per command of root with the files in dir, which
// holds nothing else; with update it writes them.
func Check(t *testing.T, root *cobra.Command, dir string, update bool) {
	t.Helper()
	root.InitDefaultCompletionCmd()
	if update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	wanted := map[string]bool{}
	walk(root, func(c *cobra.Command) {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-")
		file := filepath.Join(dir, name+".1")
		wanted[file] = true
		c.DisableAutoGenTag = true
		// A fixed date: a man page changes when its text does.
		day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		var b bytes.Buffer
		if err := doc.GenMan(c, &doc.GenManHeader{Title: strings.ToUpper(name), Section: "1", Source: "klatch", Manual: "Klatch", Date: &day}, &b); err != nil {
			t.Fatal(err)
		}
		if update {
			if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil { //nolint:forbidigo // git has the old one
				t.Fatal(err)
			}
		}
		if have, err := os.ReadFile(file); err != nil || !bytes.Equal(have, b.Bytes()) {
			t.Errorf("%s is not up to date (%v); write it again with: make gen", file, err)
		}
	})
	files, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !wanted[f] {
			t.Errorf("%s belongs to no command", f)
		}
	}
}

// walk visits our own commands, not cobra's.
func walk(c *cobra.Command, visit func(*cobra.Command)) {
	if c.Name() == "completion" || c.Name() == "help" {
		return
	}
	visit(c)
	for _, sub := range c.Commands() {
		walk(sub, visit)
	}
}
