// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

//go:generate go test -run TestGenerated . -update

var update = flag.Bool("update", false, "write generated files")

// TestGeneratedManPages keeps klatchd's man pages equal to its help texts.
func TestGeneratedManPages(t *testing.T) {
	root := command()
	for _, c := range append([]*cobra.Command{root}, root.Commands()...) {
		c.DisableAutoGenTag = true
		name := strings.ReplaceAll(c.CommandPath(), " ", "-")
		var b bytes.Buffer
		day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		if err := doc.GenMan(c, &doc.GenManHeader{Title: strings.ToUpper(name), Section: "1", Source: "klatch", Manual: "Klatch", Date: &day}, &b); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("../../dist/man", name+".1")
		if *update {
			if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(want, b.Bytes()) {
			t.Errorf("%s is not up to date (%v); write it again with: go generate ./cmd/klatchd", path, err)
		}
	}
}

// TestExampleHoldsEverySettingAtItsDefault keeps the example true.
func TestExampleHoldsEverySettingAtItsDefault(t *testing.T) {
	example, err := os.ReadFile("../../dist/conf.d/00-example.toml")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	dir := filepath.Join(root, "etc/klatch/conf.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	_, defaults, err := readSettings(root)
	if err != nil {
		t.Fatal(err)
	}
	// Lines such as #key = "value" are settings that are switched off.
	var on []string
	for line := range strings.Lines(string(example)) {
		if strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "# ") {
			on = append(on, line[1:])
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "50.toml"), []byte(strings.Join(on, "")), 0o644); err != nil {
		t.Fatal(err)
	}
	_, set, err := readSettings(root)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range set {
		if s.Origin == "default" || s.Value != defaults[i].Value {
			t.Errorf("the example says %s = %s from %s; the default is %s", s.Key, s.Value, s.Origin, defaults[i].Value)
		}
	}
}

func TestSettingsThatAreRefused(t *testing.T) {
	for _, tt := range []struct{ line, want string }{
		{`check_interval = "1s"`, "check_interval is 1s, at least 5s is possible"},
		{`soak = "0"`, "soak is 0s, at least 1s is possible"},
		{`log_level = "loud"`, `log_level "loud" is not debug, info, warn or error`},
		{`evidence = "never"`, `evidence "never" is not published or required`},
		{`chekc_interval = "1h"`, `unknown key "chekc_interval"`},
	} {
		root := t.TempDir()
		dir := filepath.Join(root, "run/klatch/conf.d")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "50.toml"), []byte("# a comment\n"+tt.line+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, _, err := readSettings(root); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "50.toml:2: ") {
			t.Errorf("%s: %v, want %q", tt.line, err, tt.want)
		}
	}
}
