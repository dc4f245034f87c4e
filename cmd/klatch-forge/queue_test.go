// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"klatch/internal/fault"
)

// forge runs the program's command line in this process.
func forge(args ...string) (string, error) {
	c := root()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(args)
	err := c.Execute()
	return out.String(), err
}

func TestQueueTakesAHandWrittenLivepatch(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	if _, err := forge("init", data, "--profile", "lab"); err != nil {
		t.Fatal(err)
	}
	in := func(args ...string) (string, error) {
		return forge(append([]string{"--dir", data, "queue"}, args...)...)
	}
	check := filepath.Join(t.TempDir(), "check")
	if err := os.WriteFile(check, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := in("add", "--source", "../../lab/livepatches/counts-reads", "--check", check); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := in("list", "--json")
	var doc struct {
		Handwritten *handwrittenRow `json:"handwritten"`
		Patches     []queueRow      `json:"patches"`
	}
	if err != nil || json.Unmarshal([]byte(out), &doc) != nil || doc.Handwritten == nil {
		t.Fatalf("%v: %s", err, out)
	}
	h := doc.Handwritten
	if !slices.Equal(h.Functions, []string{"vmlinux:cmdline_proc_show"}) || len(h.Callbacks) != 2 || h.Shadows != 1 || !h.Checked ||
		len(h.Files) != 2 || len(doc.Patches) != 0 {
		t.Errorf("list: %s", out)
	}
	patch := filepath.Join(t.TempDir(), "x.patch")
	if err := os.WriteFile(patch, []byte("--- a/x.c\n+++ b/x.c\n@@ -1 +1 @@\n-a\n+b\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := in("add", patch, "--fixes", "CVE-2000-0002"); fault.CodeOf(err) != "mixed_queue" {
		t.Errorf("a source patch beside it: %v", err)
	}
	if _, err := in("drop", "--source"); err != nil {
		t.Error(err)
	}
	if _, err := in("add", patch, "--fixes", "CVE-2000-0002"); err != nil {
		t.Error(err)
	}
	for _, args := range [][]string{{"add", patch}, {"add", patch, "--fixes", "CVE-2000-0003", "--source", "x"}, {"drop"}, {"drop", "--source", "x"}} {
		if out, err := in(args...); err == nil {
			t.Errorf("%q: accepted: %s", args, out)
		}
	}
}
