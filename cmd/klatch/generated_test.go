// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

//go:generate go test -run "TestGenerated|TestCommands" . -update

var update = flag.Bool("update", false, "write generated files and golden files")

// golden compares a generated file with the committed one.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not up to date; write it again with: go generate ./cmd/klatch\n%s", path, got)
	}
}

// TestGeneratedManPages keeps dist/man equal to the help texts.
func TestGeneratedManPages(t *testing.T) {
	dir := "../../dist/man"
	root := command()
	root.InitDefaultCompletionCmd()
	wanted := map[string]bool{}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Name() == "completion" || c.Name() == "help" {
			return // cobra's own
		}
		name := strings.ReplaceAll(c.CommandPath(), " ", "-")
		c.DisableAutoGenTag = true
		var b bytes.Buffer
		// A fixed date: a man page changes when its text does.
		day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		if err := doc.GenMan(c, &doc.GenManHeader{Title: strings.ToUpper(name), Section: "1", Source: "klatch", Manual: "Klatch", Date: &day}, &b); err != nil {
			t.Fatal(err)
		}
		golden(t, filepath.Join(dir, name+".1"), b.Bytes())
		wanted[name+".1"] = true
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	have, err := filepath.Glob(filepath.Join(dir, "klatch.1"))
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob(filepath.Join(dir, "klatch-*.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(have, more...) {
		if !wanted[filepath.Base(f)] {
			t.Errorf("%s belongs to no command", f)
		}
	}
}

// TestGeneratedCompletion keeps dist/completion equal to the commands.
func TestGeneratedCompletion(t *testing.T) {
	for name, write := range map[string]func(*cobra.Command, *bytes.Buffer) error{
		"klatch.bash": func(c *cobra.Command, b *bytes.Buffer) error { return c.GenBashCompletionV2(b, true) },
		"klatch.zsh":  func(c *cobra.Command, b *bytes.Buffer) error { return c.GenZshCompletion(b) },
		"klatch.fish": func(c *cobra.Command, b *bytes.Buffer) error { return c.GenFishCompletion(b, true) },
	} {
		var b bytes.Buffer
		if err := write(command(), &b); err != nil {
			t.Fatal(err)
		}
		golden(t, "../../dist/completion/"+name, b.Bytes())
	}
}
