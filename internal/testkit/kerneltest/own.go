// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/build/klpbuild"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
)

// OwnKernel is a kernel that the tests built themselves from a source package,
// with the config of lab/kernels, and added to a cache of its own: in the
// shared one, tests look for the stock kernels.
type OwnKernel struct {
	Entry catalog.Entry
	Tree  kerneltree.Tree
	Cache string
	Tools map[string]string
	Parts kerneltree.Own // what it was added from
}

var own = sync.OnceValues(makeOwn)

// Own returns the own kernel, the same in all tests of all packages. Without a
// cache it takes as long as a kernel build, and half as long again.
func Own(t testing.TB) OwnKernel {
	t.Helper()
	testkit.Need(t, "apt", "root", "ownkernel")
	k, err := own()
	if err != nil {
		t.Fatalf("make an own kernel: %v", err)
	}
	return k
}

// firstSeries is the first kernel that has scripts/livepatch/klp-build.
var firstSeries = [2]int{6, 19}

var sourcePackage = regexp.MustCompile(`^linux-source-([0-9]+)\.([0-9]+)$`)

// newestSource finds the newest source package that has klp-build.
func newestSource(ctx context.Context, a *archive.Archive) (archive.Package, error) {
	names, err := a.Names(ctx, "linux-source-")
	if err != nil {
		return archive.Package{}, err
	}
	best, series := "", firstSeries
	for _, n := range names {
		m := sourcePackage.FindStringSubmatch(n)
		if m == nil {
			continue
		}
		major, err1 := strconv.Atoi(m[1])
		minor, err2 := strconv.Atoi(m[2])
		if have := [2]int{major, minor}; err1 == nil && err2 == nil && slices.Compare(have[:], series[:]) >= 0 {
			best, series = n, have
		}
	}
	if best == "" {
		return archive.Package{}, fmt.Errorf("no source package of Linux %d.%d or newer among %q", firstSeries[0], firstSeries[1], names)
	}
	return a.Find(ctx, best, "")
}

func makeOwn() (OwnKernel, error) {
	var k OwnKernel
	ctx := context.Background()
	cache, err := datadir.CacheDir()
	if err != nil {
		return k, err
	}
	suites, err := archive.HostSuites(ctx, "trixie")
	if err != nil {
		return k, err
	}
	a, err := archive.Open(filepath.Join(cache, "apt-backports"), []archive.Suite{{URI: suites[0].URI, Name: "trixie-backports"}})
	if err != nil {
		return k, err
	}
	if err := a.Update(ctx, false); err != nil {
		return k, err
	}
	p, err := newestSource(ctx, a)
	if err != nil {
		return k, err
	}
	config, err := ownConfig()
	if err != nil {
		return k, err
	}
	sum := sha256.Sum256(config)
	b := ownBuild{dir: filepath.Join(cache, "own-kernel", p.Version+"-"+hex.EncodeToString(sum[:])[:12]), config: config}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return k, err
	}
	unlock, err := waitForLock(b.dir + ".lock")
	if err != nil {
		return k, err
	}
	defer unlock() //nolint:errcheck // nothing was written
	if err := b.make(ctx, a, p); err != nil {
		return k, fmt.Errorf("build %s %s: %w", p.Name, p.Version, err)
	}
	k.Cache = filepath.Join(b.dir, "cache")
	k.Parts = kerneltree.Own{Source: b.source(), Config: filepath.Join(b.source(), ".config"), Vmlinux: filepath.Join(b.source(), "vmlinux"),
		Image: filepath.Join(b.source(), "arch/x86/boot/bzImage"), Modules: b.source(), Builder: klpbuild.Name}
	step := func(string) func(string) { return func(string) {} }
	m := kerneltree.Maker{Cache: k.Cache, Distro: kerneltree.OwnDistro, Step: step, Say: func(string, ...any) {}}
	if k.Entry, err = m.AddOwn(ctx, k.Parts); err != nil {
		return k, err
	}
	if _, err := (&klpbuild.Driver{Cache: k.Cache, CCache: b.ccache()}).Prepare(ctx, k.Entry, step); err != nil {
		return k, err
	}
	k.Tree = kerneltree.At(k.Cache, k.Entry)
	k.Tools, err = klpbuild.Tools(k.Cache, k.Entry)
	return k, err
}

// waitForLock lets tests of several packages run side by side: the first makes
// the kernel, the others wait for it.
func waitForLock(path string) (func() error, error) {
	for end := time.Now().Add(ownTimeout); ; {
		unlock, err := durable.Lock(path)
		if fault.KindOf(err) != fault.Conflict || time.Now().After(end) {
			return unlock, err
		}
		<-time.After(time.Second)
	}
}

// ownConfig reads lab/kernels/own.config of this repository.
func ownConfig() ([]byte, error) {
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if b, err := os.ReadFile(filepath.Join(dir, "lab/kernels/own.config")); err == nil {
			return b, nil
		}
	}
	return nil, errors.Join(errors.New("find lab/kernels/own.config above the working folder"), err)
}

// ownBuild is a kernel that is built as its owner would.
type ownBuild struct {
	dir    string
	config []byte
}

func (b ownBuild) source() string { return filepath.Join(b.dir, "source") }
func (b ownBuild) ccache() string { return filepath.Join(b.dir, "ccache") }

// ownTimeout is for a machine that does much else.
const ownTimeout = 90 * time.Minute

func (b ownBuild) make(ctx context.Context, a *archive.Archive, p archive.Package) error {
	ready := filepath.Join(b.dir, "built")
	if _, err := os.Stat(ready); err == nil {
		return nil
	}
	unpacked := filepath.Join(b.dir, "unpacked")
	for _, d := range []string{b.source(), unpacked} {
		if err := errors.Join(os.RemoveAll(d), os.MkdirAll(d, 0o755), sandbox.Own(d)); err != nil {
			return err
		}
	}
	if err := errors.Join(os.MkdirAll(b.ccache(), 0o755), sandbox.Own(b.ccache())); err != nil {
		return err
	}
	if err := a.Download(ctx, []archive.Package{p}, func(string, int64, int64) {}); err != nil {
		return err
	}
	if err := archive.Unpack(ctx, a.File(p), unpacked, "./usr/src/linux-source-*.tar.xz"); err != nil {
		return err
	}
	if err := archive.UnpackTar(ctx, filepath.Join(unpacked, "usr/src", p.Name+".tar.xz"), b.source()); err != nil {
		return err
	}
	fragment := filepath.Join(b.dir, "own.config")
	if err := errors.Join(os.RemoveAll(unpacked), durable.WriteFile(fragment, b.config, 0o644)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, ownTimeout)
	defer cancel()
	// The flags are klp-build's: with a ccache its own build of the same
	// kernel compiles nothing (docs/howto/own-kernel.md).
	env := append(sandbox.BaseEnv(), "PATH=/usr/lib/ccache:/usr/sbin:/usr/bin:/sbin:/bin", "CCACHE_DIR="+b.ccache(), "CCACHE_DEPEND=1",
		"CCACHE_TEMPDIR=/run", "CCACHE_NOHASHDIR=1")
	for _, args := range [][]string{
		{"KCONFIG_ALLCONFIG=" + fragment, "allnoconfig"},
		{"KLP_SYMIDS=1", "KCFLAGS=-ffunction-sections -fdata-sections", "bzImage", "modules"},
	} {
		argv := append([]string{"make", "-s", "-j" + strconv.Itoa(runtime.NumCPU()), "CC=" + ownCC, "HOSTCC=" + ownCC}, args...)
		res, err := sandbox.Run(ctx, sandbox.Command{Dir: b.source(), Writable: []string{b.source(), b.ccache()}, Env: env, Argv: argv})
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			return fmt.Errorf("%q ended with status %d: %s", argv, res.Exit, res.Output[max(0, len(res.Output)-2000):])
		}
	}
	return durable.WriteFile(ready, nil, 0o644)
}

// ownCC is the compiler of the project's other kernel, so that no more is needed.
const ownCC = "gcc-12"
