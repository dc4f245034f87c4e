// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"context"
	"regexp"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/buildroot"
	"klatch/internal/forge/catalog"
)

// debianCompiler finds, in what a compiler of Debian says of itself, the
// package and its version: "x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0".
var debianCompiler = regexp.MustCompile(`^(?:[a-z0-9_]+-linux-gnu-)?(gcc-[0-9]+) \(Debian (\S+)\) `)

// root makes the root folder of a kernel ready, with exactly the compiler that
// the kernel's banner names, and writes it into the entry. Without one the
// host's programs are used, and the result is empty.
func (m Maker) root(ctx context.Context, e *catalog.Entry) (buildroot.Root, error) {
	if m.Root == nil {
		return buildroot.Root{}, nil
	}
	f := debianCompiler.FindStringSubmatch(e.Compiler)
	if f == nil {
		return buildroot.Root{}, fault.New(fault.Invalid, "other_compiler", "kernel %s was compiled by %q, which is no gcc of Debian", e.Release, e.Compiler)
	}
	make := buildroot.Maker{Archive: m.Archive, Cache: m.Cache, Step: buildroot.Step(m.Step), Progress: m.Progress}
	r, err := make.Make(ctx, *m.Root, map[string]string{f[1]: f[2]})
	if err != nil {
		return r, err
	}
	have, err := r.Compiler(ctx, e.CC)
	if err != nil {
		return r, err
	}
	if !SameCompiler(have, e.Compiler) {
		return r, fault.New(fault.Internal, "other_compiler", "kernel %s was compiled by %q, root folder %s has %q", e.Release, e.Compiler, r.Name, have)
	}
	e.Buildroot, e.Toolchain = r.Name, r.Versions(m.Root.Toolchain)
	return r, nil
}

// SameCompiler compares what two compilers say of themselves. The first word is
// only how each was called.
func SameCompiler(a, b string) bool {
	_, a, _ = strings.Cut(a, " ")
	_, b, _ = strings.Cut(b, " ")
	return a == b
}

// RootOf is the root folder in the cache that an entry's kernel is compiled in;
// empty if it is compiled with the host's programs.
func RootOf(cache string, e catalog.Entry) (buildroot.Root, error) {
	if e.Buildroot == "" {
		return buildroot.Root{}, nil
	}
	return buildroot.Find(cache, e.Buildroot, e.Toolchain)
}
