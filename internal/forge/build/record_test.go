// SPDX-License-Identifier: Apache-2.0

package build_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
)

// writer is a builder of any bytes.
type writer string

func (w writer) Build(_ context.Context, p compose.Plan, dir string, _ *build.Clock) (build.Result, error) {
	file := filepath.Join(dir, p.Sequence.ModuleName()+".ko")
	sum := sha256.Sum256([]byte(w))
	return build.Result{Result: build.Built, Functions: []livepatch.Function{{Object: "vmlinux", Name: "f"}},
		Module: &build.Module{Path: file, SHA256: hex.EncodeToString(sum[:]), Bytes: int64(len(w))}}, os.WriteFile(file, []byte(w), 0o644)
}

// TestThePlanIsRecordedBesideTheBuild: a second builder gets what the digest
// covers, a changed record is noticed, and a mended author is taken over.
func TestThePlanIsRecordedBesideTheBuild(t *testing.T) {
	data := t.TempDir()
	plan := func(author string) compose.Plan {
		return compose.Plan{Kernel: catalog.Entry{Release: "6.1.0-50-cloud-amd64", Distro: "debian-12", Arch: "amd64", BuildID: [20]byte{1}}, Sequence: 1,
			Patches: []queue.Patch{{Name: "p", Fixes: []cve.ID{"CVE-2026-0001"}, Author: author, Diff: []byte("--- a/x.c\n+++ b/x.c\n@@ -1,1 +1,1 @@\n-a\n+b\n")}}}
	}
	for _, author := range []string{"", "alice"} {
		if _, err := build.Run(t.Context(), writer("bytes"), plan(author), data, build.NewClock(nil)); err != nil {
			t.Fatal(err)
		}
		res, p, err := build.Load(build.Dir(data, "6.1.0-50-cloud-amd64", 1))
		if err != nil || p.Patches[0].Author != author || res.Module.Bytes != 5 || p.Sequence != 1 {
			t.Errorf("author %q: %+v, %+v, %v", author, res.Module, p, err)
		}
	}
	if _, err := build.Run(t.Context(), writer("other"), plan(""), data, build.NewClock(nil)); fault.CodeOf(err) != "not_reproducible" {
		t.Errorf("other bytes from the same plan: %v", err)
	}
	file := filepath.Join(build.Dir(data, "6.1.0-50-cloud-amd64", 1), build.PlanFile)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code  fault.Code
		spoil func() error
	}{
		{"other_plan", func() error {
			return os.WriteFile(file, []byte(strings.Replace(string(b), "CVE-2026-0001", "CVE-2026-0002", 1)), 0o644)
		}},
		{"bad_plan", func() error { return os.WriteFile(file, []byte("{}"), 0o644) }},
		{"no_plan", func() error { return os.Remove(file) }},
		{"no_build", func() error { return os.RemoveAll(filepath.Dir(file)) }},
	} {
		if err := c.spoil(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := build.Load(filepath.Dir(file)); fault.CodeOf(err) != c.code {
			t.Errorf("want %s: %v", c.code, err)
		}
	}
}
