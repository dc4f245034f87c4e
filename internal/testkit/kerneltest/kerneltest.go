// SPDX-License-Identifier: Apache-2.0

// Package kerneltest gives tests a real, prepared distribution kernel: from
// the cache, or from the distribution's archive, as a publisher would get it.
package kerneltest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"

	"klatch/internal/forge/archive"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/buildroot"
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

var (
	once   = sync.OnceValues(debian12)
	once13 = sync.OnceValues(debian13)
)

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

// Debian13 returns a kernel of Debian 13 in the same way: the newest that has
// source of its version, compiled in that release's root folder.
func Debian13(t testing.TB) Kernel {
	t.Helper()
	testkit.Need(t, "apt", "root", "debootstrap")
	k, err := once13()
	if err != nil {
		t.Fatalf("prepare a kernel of Debian 13: %v", err)
	}
	return k
}

func debian12() (Kernel, error) {
	return prepare("debian-12", "apt", nil, func(context.Context, *archive.Archive) ([]string, error) { return Candidates, nil }, "bookworm", "trixie")
}

func debian13() (Kernel, error) {
	root := buildroot.Debian13()
	return prepare("debian-13", "apt-debian-13", &root, newest13, "trixie")
}

// newest13 lists the kernels of Debian 13 in the archive, newest first.
func newest13(ctx context.Context, a *archive.Archive) ([]string, error) {
	all, err := a.Kernels(ctx, "cloud-amd64")
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(r string) bool { return !numbered.MatchString(r) })
	slices.SortFunc(all, func(a, b string) int { return slices.Compare(numbers(b), numbers(a)) })
	return all[:min(len(all), 4)], nil
}

var numbered = regexp.MustCompile(`^6\.12\.([0-9]+)\+deb13(?:\.([0-9]+))?-cloud-amd64$`)

func numbers(release string) []int {
	var ns []int
	for _, d := range numbered.FindStringSubmatch(release)[1:] {
		n, _ := strconv.Atoi(d) // nothing: the first of its version
		ns = append(ns, n)
	}
	return ns
}

func prepare(distro kernel.Distro, state string, root *buildroot.Spec, candidates func(context.Context, *archive.Archive) ([]string, error),
	suite string, also ...string) (Kernel, error) {
	ctx := context.Background()
	cache, err := datadir.CacheDir()
	if err != nil {
		return Kernel{}, err
	}
	suites, err := archive.HostSuites(ctx, suite, also...)
	if err != nil {
		return Kernel{}, err
	}
	a, err := archive.Open(filepath.Join(cache, state), suites)
	if err != nil {
		return Kernel{}, err
	}
	if err := a.Update(ctx, false); err != nil {
		return Kernel{}, err
	}
	none := func(string, int64, int64) {}
	m := kerneltree.Maker{Archive: a, Cache: cache, Distro: distro, Progress: none, Root: root,
		Step: func(string) func(string) { return func(string) {} }, Say: func(string, ...any) {}}
	tools, err := objbuild.FetchTools(ctx, a, cache, none)
	if err != nil {
		return Kernel{}, err
	}
	names, err := candidates(ctx, a)
	if err != nil {
		return Kernel{}, err
	}
	last := errors.New("the archive has none")
	for _, c := range names {
		e, err := m.Add(ctx, kernel.Release(c), "")
		if err == nil {
			return Kernel{e, kerneltree.At(cache, e), cache, tools, m}, nil
		}
		last = err
	}
	return Kernel{}, fmt.Errorf("none of %v: %w", names, last)
}
