// SPDX-License-Identifier: Apache-2.0

// Package kerneltest gives tests a real, prepared distribution kernel: from
// the cache, or from the distribution's archive, as a publisher would get it.
package kerneltest

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"klatch/internal/forge/archive"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/kernel"
	"klatch/internal/testkit"
)

// Kernel is a prepared kernel.
type Kernel struct {
	Entry catalog.Entry
	Tree  kerneltree.Tree
	Cache string
	Tools objbuild.Tools
	Maker kerneltree.Maker
}

// Candidates are the stock kernels that the tests and the demo know fixes for,
// best first. Debian removes old ones from its archive.
var Candidates = []string{"6.1.0-50-cloud-amd64", "6.1.0-49-cloud-amd64", "6.1.0-48-cloud-amd64", "6.1.0-47-cloud-amd64"}

var once = sync.OnceValues(prepare)

// Prepared returns a kernel, the same in all tests of a package. It needs apt
// and root.
func Prepared(t testing.TB) Kernel {
	t.Helper()
	testkit.Need(t, "apt", "root")
	k, err := once()
	if err != nil {
		t.Fatalf("prepare a kernel: %v", err)
	}
	return k
}

func prepare() (Kernel, error) {
	ctx := context.Background()
	cache, err := datadir.CacheDir()
	if err != nil {
		return Kernel{}, err
	}
	suites, err := archive.HostSuites(ctx, "bookworm", "trixie")
	if err != nil {
		return Kernel{}, err
	}
	a, err := archive.Open(filepath.Join(cache, "apt"), suites)
	if err != nil {
		return Kernel{}, err
	}
	if err := a.Update(ctx, false); err != nil {
		return Kernel{}, err
	}
	none := func(string, int64, int64) {}
	m := kerneltree.Maker{Archive: a, Cache: cache, Distro: "debian-12", Progress: none,
		Step: func(string) func(string) { return func(string) {} }, Say: func(string, ...any) {}}
	tools, err := objbuild.FetchTools(ctx, a, cache, none)
	if err != nil {
		return Kernel{}, err
	}
	var last error
	for _, c := range Candidates {
		e, err := m.Add(ctx, kernel.Release(c), "")
		if err == nil {
			return Kernel{e, kerneltree.At(cache, e), cache, tools, m}, nil
		}
		last = err
	}
	return Kernel{}, fmt.Errorf("none of %v: %w", Candidates, last)
}
