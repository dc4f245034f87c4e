// SPDX-License-Identifier: Apache-2.0

// Package kerneltree makes, from a distribution's packages, what a build
// needs of one kernel: a prepared source tree with the distribution's config,
// the vmlinux with its symbols, and the image to boot. All of it lies in the
// cache, outside any repository, and can be thrown away.
package kerneltree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/buildroot"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/sandbox"
	"klatch/internal/kernel"
)

// Step tells a person what is being done; it returns the function that says
// that it is over.
type Step func(what string) (done func(note string))

// Maker makes kernels from Debian's archive.
type Maker struct {
	Archive  *archive.Archive
	Cache    string // folder outside the project
	Distro   kernel.Distro
	Step     Step
	Progress archive.Progress
	Say      func(format string, args ...any)
	// Root is the root folder whose programs compile this distribution's
	// kernels; nil means this host's.
	Root *buildroot.Spec
}

// Tree is a prepared kernel in the cache.
type Tree struct {
	Dir string
}

// At is the tree that belongs to a catalog entry.
func At(cache string, e catalog.Entry) Tree {
	return Tree{filepath.Join(cache, "kernels", string(e.Release)+"_"+e.SourceV)}
}

// Source is the prepared source tree.
func (t Tree) Source() string { return filepath.Join(t.Dir, "tree") }

// Vmlinux is the distribution's own vmlinux with its symbol table.
func (t Tree) Vmlinux() string { return filepath.Join(t.Dir, "vmlinux") }

// Symbols is the symbol table of Vmlinux as readelf prints it, the form that
// create-diff-object reads.
func (t Tree) Symbols() string { return filepath.Join(t.Dir, "vmlinux.symtab") }

// Image is the kernel to boot.
func (t Tree) Image() string { return filepath.Join(t.Dir, "vmlinuz") }

// Config is the distribution's .config.
func (t Tree) Config() string { return filepath.Join(t.Dir, "config") }

func (t Tree) ready() string { return filepath.Join(t.Dir, "ready") }

// Ready says whether the tree was made to its end.
func (t Tree) Ready() bool {
	for _, f := range []string{t.ready(), t.units()} { // an older Klatch made no units
		if _, err := os.Stat(f); err != nil {
			return false
		}
	}
	return true
}

// kernelPackages are the packages of one kernel.
type kernelPackages struct{ image, headers, common, debug, source archive.Package }

func (k kernelPackages) all() []archive.Package {
	return []archive.Package{k.image, k.headers, k.common, k.debug, k.source}
}

var (
	commonDepend  = regexp.MustCompile(`(linux-headers-[^ ,]*-common)\b`)
	seriesPattern = regexp.MustCompile(`^([0-9]+\.[0-9]+)\.`)
)

// resolve finds all packages of one kernel, of one version.
func (m Maker) resolve(ctx context.Context, r kernel.Release, sourceVersion string) (kernelPackages, error) {
	var k kernelPackages
	if err := m.ours(r); err != nil {
		return k, err
	}
	var err error
	if k.image, err = m.Archive.Find(ctx, "linux-image-"+string(r), ""); err != nil {
		return k, m.explain(ctx, r, err)
	}
	v := k.image.Version
	if k.headers, err = m.Archive.Find(ctx, "linux-headers-"+string(r), v); err != nil {
		return k, err
	}
	common := commonDepend.FindString(k.headers.Depends)
	if common == "" {
		return k, fault.New(fault.NotFound, "no_package", "package %s names no common headers", k.headers.Name)
	}
	if k.common, err = m.Archive.Find(ctx, common, v); err != nil {
		return k, err
	}
	if k.debug, err = m.Archive.Find(ctx, "linux-image-"+string(r)+"-dbg", v); err != nil {
		return k, err
	}
	series := seriesPattern.FindStringSubmatch(v)
	if series == nil {
		return k, fault.New(fault.Invalid, "bad_version", "package version %q has no series", v)
	}
	if sourceVersion == "" {
		sourceVersion = v
	}
	k.source, err = m.Archive.Find(ctx, "linux-source-"+series[1], sourceVersion)
	return k, err
}

// madeFor finds in a release for which Debian it was built. 6.12 is built twice,
// by two compilers: +deb13, and +deb12 for Debian 12's security archive.
var madeFor = regexp.MustCompile(`\+deb([0-9]+)`)

// ours refuses a kernel that was built for another release of Debian.
func (m Maker) ours(r kernel.Release) error {
	f := madeFor.FindStringSubmatch(string(r))
	if f == nil || "debian-"+f[1] == string(m.Distro) {
		return nil
	}
	return fault.New(fault.Invalid, "other_distro", "kernel %s was built for Debian %s, not for %s", r, f[1], m.Distro).
		WithHint("name its distribution: --distro debian-%s", f[1])
}

// explain says what the archive does have where a kernel is not there.
func (m Maker) explain(ctx context.Context, r kernel.Release, cause error) error {
	if fault.KindOf(cause) != fault.NotFound {
		return cause
	}
	have, err := m.Archive.Kernels(ctx, "cloud-amd64")
	if err != nil {
		return errors.Join(cause, err)
	}
	have = slices.DeleteFunc(have, func(n string) bool { return m.ours(kernel.Release(n)) != nil })
	return fault.New(fault.NotFound, "no_kernel", "kernel %s is not in the archive: %w", r, cause).
		WithHint("Debian removes old kernels; choose one of: %s", strings.Join(have, ", "))
}

// Add makes a kernel, or finds it made, and returns its catalog entry.
// sourceVersion overrides the version of the source package; empty means the
// image's own, which is the only one that the match proof should accept.
func (m Maker) Add(ctx context.Context, r kernel.Release, sourceVersion string) (catalog.Entry, error) {
	var e catalog.Entry
	k, err := m.resolve(ctx, r, sourceVersion)
	if err != nil {
		return e, err
	}
	e = catalog.Entry{Release: r, Distro: m.Distro, Arch: kernel.AMD64, Version: k.image.Version,
		Source: k.source.Name, SourceV: k.source.Version, Packages: map[string]string{}}
	e.Series = "debian-" + seriesPattern.FindStringSubmatch(k.image.Version)[1]
	for _, p := range k.all() {
		e.Packages[p.Name] = p.Version + " " + p.SHA256
	}
	t := At(m.Cache, e)
	missing, err := m.Archive.Missing(k.all())
	if err != nil {
		return e, err
	}
	if !t.Ready() && missing > 0 {
		m.Say("kernel %s: %d packages, %d MB to download", r, len(k.all()), (missing+999_999)/1_000_000)
		done := m.Step("download " + string(r))
		if err := m.Archive.Download(ctx, k.all(), m.Progress); err != nil {
			return e, err
		}
		done(fmt.Sprintf("%d MB", (missing+999_999)/1_000_000))
	}
	unlock, err := lock(filepath.Join(m.Cache, "kernels"), filepath.Base(t.Dir))
	if err != nil {
		return e, err
	}
	defer unlock() //nolint:errcheck // nothing was written
	if !t.Ready() {
		if err := m.make(ctx, t, k, &e); err != nil {
			return e, err
		}
	}
	if err := m.describe(t, &e); err != nil {
		return e, err
	}
	_, err = m.root(ctx, &e)
	return e, err
}

// make fills the tree's folder. What an earlier, broken run left is removed
// first; the marker comes last.
func (m Maker) make(ctx context.Context, t Tree, k kernelPackages, e *catalog.Entry) error {
	if err := os.RemoveAll(t.Dir); err != nil {
		return err
	}
	for _, d := range []string{t.Dir, t.Source(), filepath.Join(t.Dir, "unpacked")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		if d == t.Dir {
			continue // vmlinux, against which builds are proved, is not the build user's
		}
		if err := sandbox.Own(d); err != nil {
			return err
		}
	}
	unpacked := filepath.Join(t.Dir, "unpacked")
	// Uncompressing takes most of the time, and one core for each package. The
	// source and the binary packages meet in prepare.
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.unpackSource(gctx, t, k.source, unpacked) })
	g.Go(func() error {
		if err := m.unpackBinary(gctx, k, unpacked, string(e.Release)); err != nil {
			return err
		}
		if err := m.takeModules(t, unpacked, string(e.Release)); err != nil {
			return err
		}
		return m.takeImage(gctx, t, unpacked, e.Release)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := m.prepare(ctx, t, unpacked, e); err != nil {
		return err
	}
	if err := os.RemoveAll(unpacked); err != nil {
		return err
	}
	return durable.WriteFile(t.ready(), []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o644)
}

// unpackBinary unpacks what the build needs of the image and its companions.
func (m Maker) unpackBinary(ctx context.Context, k kernelPackages, unpacked, release string) error {
	done := m.Step("unpack packages of " + release)
	for _, u := range []struct {
		p        archive.Package
		patterns []string
	}{
		{k.image, []string{"./boot/vmlinuz-*", "./boot/config-*", "lib/modules/" + release + "/kernel"}},
		{k.headers, []string{"./usr/src/*/Module.symvers", "./usr/src/*/.config"}},
		{k.debug, []string{"./usr/lib/debug/boot/vmlinux-*", "./usr/lib/debug/lib/modules/" + release + "/kernel"}},
	} {
		if err := archive.Unpack(ctx, m.Archive.File(u.p), unpacked, u.patterns...); err != nil {
			return err
		}
	}
	if err := archive.UncompressXZ(ctx, unpacked, "*.ko.xz"); err != nil {
		return err
	}
	done("")
	return nil
}

// takeImage moves the image, the config and the vmlinux into place and proves
// that image and vmlinux are one compiled kernel: same build id, same text.
func (m Maker) takeImage(ctx context.Context, t Tree, unpacked string, r kernel.Release) error {
	done := m.Step("check that image and debug symbols are one kernel")
	debug := filepath.Join(unpacked, "usr/lib/debug/boot/vmlinux-"+string(r))
	for from, to := range map[string]string{
		filepath.Join(unpacked, "boot/vmlinuz-"+string(r)): t.Image(),
		filepath.Join(unpacked, "boot/config-"+string(r)):  t.Config(),
	} {
		if err := os.Rename(from, to); err != nil {
			return err
		}
	}
	// Debug information is five sixths of the file; nothing here reads it.
	if out, err := exec.CommandContext(ctx, "strip", "--strip-debug", "--keep-file-symbols", "-o", t.Vmlinux(), debug).CombinedOutput(); err != nil {
		return fmt.Errorf("strip %s: %s: %w", debug, bytes.TrimSpace(out), err)
	}
	if err := os.Remove(debug); err != nil {
		return err
	}
	bz, err := durable.ReadFile(t.Image(), 128<<20)
	if err != nil {
		return err
	}
	build, err := sameKernel(bz, t.Vmlinux(), "vmlinuz-"+string(r))
	if err != nil {
		return err
	}
	symbols, err := exec.CommandContext(ctx, "readelf", "-sW", t.Vmlinux()).Output()
	if err != nil {
		return fmt.Errorf("read symbols of %s: %w", t.Vmlinux(), err)
	}
	if err := durable.WriteFile(t.Symbols(), symbols, 0o644); err != nil {
		return err
	}
	done("build " + build.Short())
	return nil
}

func identifyFile(path string) (identity, error) {
	f, err := os.Open(path)
	if err != nil {
		return identity{}, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	return identify(f, filepath.Base(path))
}

// describe fills in what is read from the finished tree.
func (m Maker) describe(t Tree, e *catalog.Entry) error {
	id, err := identifyFile(t.Vmlinux())
	if err != nil {
		return err
	}
	e.BuildID = id.build
	if e.Compiler, err = compilerOf(id.banner); err != nil {
		return err
	}
	e.CC, _, _ = strings.Cut(e.Compiler, " ")
	config, err := durable.ReadFile(t.Config(), 4<<20)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(config)
	e.ConfigSHA256 = hex.EncodeToString(sum[:])
	e.StructSizes, err = readSizes(t)
	return err
}

// lock keeps two runs from making the same kernel. It is released when the
// process ends, however it ends.
func lock(dir, name string) (func() error, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return durable.Lock(filepath.Join(dir, "."+name+".lock"))
}

// Remove throws a tree away.
func (t Tree) Remove() error {
	if err := os.Remove(t.ready()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(t.Dir)
}
