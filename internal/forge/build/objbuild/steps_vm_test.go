// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"os"
	"path"
	"path/filepath"
	"testing"

	"klatch/internal/forge/build/delta"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// BenchmarkSteps is what a build does itself, without programs that it starts,
// on a real kernel.
func BenchmarkSteps(b *testing.B) {
	k := kerneltest.Prepared(b)
	patch := edit(b, k, timens, func(s string) string { return nopAtDefinition(b, s, "proc_timens_set_offset") })
	plan, err := compose.New(k.Entry, []queue.Patch{patch}, k.Tools.Version(), 1)
	if err != nil {
		b.Fatal(err)
	}
	object := compileAlone(b, k, k.Cache, "")
	file := filepath.Join(b.TempDir(), "namespace.o")
	if err := os.WriteFile(file, object, 0o644); err != nil {
		b.Fatal(err)
	}
	units, err := k.Tree.Units()
	if err != nil {
		b.Fatal(err)
	}
	var sources []string
	for _, u := range units.Units {
		if path.Ext(u.Source) == ".c" {
			sources = append(sources, u.Source)
		}
	}
	includes := filepath.Join(b.TempDir(), "includes.json")
	if _, err := headers.Load(k.Tree.Source(), includes, sources); err != nil {
		b.Fatal(err)
	}
	image, err := match.Open(k.Tree.Vmlinux())
	if err != nil {
		b.Fatal(err)
	}
	fresh := filepath.Join(b.TempDir(), "fresh.json")
	for _, c := range []struct {
		name string
		step func() error
	}{
		{"match-open-vmlinux", func() error { _, err := match.Open(k.Tree.Vmlinux()); return err }},
		{"match-open-module", func() error { _, err := match.OpenModule(k.Tree.ModuleFile("dummy"), "dummy"); return err }},
		{"match-changed", func() error { _, err := match.Changed(file, file); return err }},
		{"match-object", func() error { r := match.Empty(); return image.Object(file, timens, timensFunctions, &r) }},
		{"delta-compare", func() error { _, err := delta.Compare(object, object); return err }},
		{"units-read", func() error { _, err := k.Tree.Units(); return err }},
		{"headers-load", func() error { _, err := headers.Load(k.Tree.Source(), includes, sources); return err }},
		{"headers-make", func() error {
			_ = os.Remove(fresh)
			_, err := headers.Load(k.Tree.Source(), fresh, sources)
			return err
		}},
		{"compose-digest", func() error { _, err := plan.Digest(); return err }},
		{"queue-lint", func() error { _, err := queue.Lint(patch.Diff); return err }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := c.step(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
