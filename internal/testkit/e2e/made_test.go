// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/demo"
	"klatch/internal/forge/lab/debian"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// work holds what all tests share, until the last one has ended.
var work string

func TestMain(m *testing.M) {
	sandbox.Child()
	if dir := os.Getenv(serveFolder); dir != "" {
		os.Exit(serveFiles(dir))
	}
	var err error
	if work, err = os.MkdirTemp("", "klatch-e2e-"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(work)
	os.Exit(code)
}

// made is what is made once for all tests.
type made struct {
	kernel kerneltest.Kernel
	image  debian.Image
	rig    *qemu.Rig
	deb    string // our package for machines
	bin    string // folder of all programs, the kit's too
	builds map[livepatch.Sequence]build.Result
	// patches are the fixes as source patches.
	patches []queue.Patch
}

var (
	makeOnce sync.Once
	theMade  made
	errMake  error
)

// everything makes it, or says why that is impossible here.
func everything(t *testing.T) made {
	t.Helper()
	testkit.Need(t, "qemu", "root", "apt", "debootstrap")
	k := kerneltest.Prepared(t)
	makeOnce.Do(func() {
		theMade, errMake = makeAll(k)
	})
	if errMake != nil {
		t.Fatalf("make what the tests need: %v", errMake)
	}
	return theMade
}

func makeAll(k kerneltest.Kernel) (made, error) {
	ctx := context.Background()
	m := made{kernel: k, bin: filepath.Join(work, "stage", "bin"), builds: map[livepatch.Sequence]build.Result{}}
	if err := m.programs(ctx); err != nil {
		return m, err
	}
	if err := m.pack(ctx); err != nil {
		return m, err
	}
	deb, err := kernelDeb(ctx, k, string(k.Entry.Release))
	if err != nil {
		return m, err
	}
	if m.image, err = debian.Build(ctx, debian.Config{Suite: "bookworm", KernelDeb: deb, Cache: filepath.Join(k.Cache, "images")}); err != nil {
		return m, err
	}
	if m.rig, err = qemu.New(qemu.Config{Guest: filepath.Join(m.bin, "guestmain"), Cache: filepath.Join(k.Cache, "lab")}); err != nil {
		return m, err
	}
	return m, m.livepatches(ctx)
}

// kernelDeb is the package of a kernel image, downloaded.
func kernelDeb(ctx context.Context, k kerneltest.Kernel, release string) (string, error) {
	a := k.Maker.Archive
	p, err := a.Find(ctx, "linux-image-"+release, "")
	if err != nil {
		return "", err
	}
	return a.File(p), a.Download(ctx, []archive.Package{p}, func(string, int64, int64) {})
}

// source is the root of this repository.
func source() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..", "..")
}

func goBuild(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = source(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// programs builds ours and the kit's, all static.
func (m made) programs(ctx context.Context) error {
	if err := os.MkdirAll(m.bin, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-trimpath", "-ldflags", "-s -w -X main.version=v0.0.0-e2e", "-o", m.bin,
		"./cmd/klatch", "./cmd/klatchd", "./cmd/klatch-loader", "./cmd/klatch-server", "./internal/testkit/cmd/klatch-hostile", "./internal/testkit/cmd/klatch-look",
		"./internal/forge/lab/guest/testdata/guestmain"}
	for _, f := range demo.Fixes {
		args = append(args, f.Check)
	}
	return goBuild(ctx, args...)
}

// pack makes the Debian package as make deb does, in a folder of its own.
func (m *made) pack(ctx context.Context) error {
	stage := filepath.Dir(m.bin)
	if err := os.CopyFS(filepath.Join(stage, "dist"), os.DirFS(filepath.Join(source(), "dist"))); err != nil {
		return err
	}
	license, err := os.ReadFile(filepath.Join(source(), "LICENSE"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(stage, "LICENSE"), license, 0o644); err != nil {
		return err
	}
	find := exec.CommandContext(ctx, "go", "tool", "-n", "-modfile=tools/go.mod", "nfpm")
	find.Dir = source()
	nfpm, err := find.Output()
	if err != nil {
		return fmt.Errorf("find nfpm: %w", err)
	}
	m.deb = filepath.Join(stage, "klatch.deb")
	cmd := exec.CommandContext(ctx, strings.TrimSpace(string(nfpm)), "package", "--config", "dist/nfpm/klatch.yaml", "--packager", "deb", "--target", m.deb)
	cmd.Dir, cmd.Env = stage, append(os.Environ(), "VERSION=0.0.0+e2e", "ARCH=amd64", "SOURCE_DATE_EPOCH=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nfpm: %w\n%s", err, out)
	}
	return nil
}

// livepatches builds sequence 1 with the first fix, 2 with both. The others
// come from the second, see module.
func (m *made) livepatches(ctx context.Context) error {
	k := m.kernel
	newest, err := k.Maker.Archive.Find(ctx, k.Entry.Source, "")
	if err != nil {
		return err
	}
	for _, f := range demo.Fixes {
		dir, err := k.Maker.Files(ctx, k.Entry.Source, newest.Version, []string{f.File})
		if err != nil {
			return err
		}
		diff, err := queue.Change(ctx, k.Tree.Source(), dir, []string{f.File}, []string{f.Function})
		if err != nil {
			return err
		}
		m.patches = append(m.patches, queue.Patch{Name: f.CVE, Fixes: []cve.ID{cve.ID(f.CVE)}, Diff: diff, Files: []string{f.File}})
	}
	return errors.Join(m.build(ctx, 1, m.patches[:1]), m.build(ctx, 2, m.patches))
}

func (m *made) build(ctx context.Context, n livepatch.Sequence, patches []queue.Patch) error {
	k := m.kernel
	plan, err := compose.New(k.Entry, patches, k.Tools.Version(), n)
	if err != nil {
		return err
	}
	data := filepath.Join(work, fmt.Sprintf("built-%d", n))
	res, err := build.Run(ctx, &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}, plan, data, build.NewClock(nil))
	if err != nil {
		return err
	}
	if res.Result != build.Built {
		return fmt.Errorf("livepatch %d: %s %s %+v", n, res.Result, res.Error, res.Refusals)
	}
	m.builds[n] = res
	return nil
}

// module is the built module of a sequence, not signed. Where a test needs
// many, the number is replaced in the second by another digit: the same code
// under another name.
func (m made) module(t *testing.T, n livepatch.Sequence) ([]byte, build.Result) {
	t.Helper()
	base := n
	switch _, built := m.builds[n]; {
	case built:
	case n > 2 && n < 10:
		base = 2
	}
	res, ok := m.builds[base]
	if !ok {
		t.Fatalf("no module for sequence %d", n)
	}
	b, err := os.ReadFile(res.Module.Path)
	if err != nil {
		t.Fatal(err)
	}
	if n == base {
		return b, res
	}
	for _, word := range []string{"klatch_%d", "klatch_sequence=%d"} {
		old, now := fmt.Appendf(nil, word, base), fmt.Appendf(nil, word, n)
		if !bytes.Contains(b, old) {
			t.Fatalf("module %d does not hold %q", base, old)
		}
		b = bytes.ReplaceAll(b, old, now)
	}
	return b, res
}
