// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/sandbox"
	"klatch/internal/kernel"
)

// OwnDistro is the distribution of a kernel that somebody built himself.
const OwnDistro kernel.Distro = "own"

// Own names the parts of a kernel that somebody built himself. All are read
// and none is changed.
type Own struct {
	Source  string         // the source tree that it was built from
	Config  string         // its .config
	Vmlinux string         // with symbols, of the very build that runs
	Image   string         // what boots; empty: it cannot be tried in the lab
	Modules string         // folder with its .ko files; empty: module code cannot be proved
	Release kernel.Release // empty: as vmlinux says
	Series  string         // of its queue; empty: own-7.2 and the like
	CC      string         // compiler's command; empty: as vmlinux says
	Builder string         // driver of the catalog entry
}

// AddOwn checks that the parts belong together and brings a copy of the tree
// to the point where it can be built. The tree is ready only after
// FinishOwn: what the kernel is made of is known when it was built once.
func (m Maker) AddOwn(ctx context.Context, o Own) (catalog.Entry, error) {
	e := catalog.Entry{Distro: OwnDistro, Arch: kernel.AMD64, Builder: o.Builder, Packages: map[string]string{}, StructSizes: map[string]int{}}
	done := m.Step("check that source, config and vmlinux are one kernel")
	config, err := o.describe(&e)
	if err != nil {
		return e, err
	}
	if err := checkCompiler(ctx, e); err != nil {
		return e, err
	}
	done("build " + e.BuildID.Short())
	t := At(m.Cache, e)
	unlock, err := lock(filepath.Join(m.Cache, "kernels"), filepath.Base(t.Dir))
	if err != nil {
		return e, err
	}
	defer unlock() //nolint:errcheck // nothing was written
	if b, err := durable.ReadFile(t.copied(), 256); err == nil {
		e.Packages["tree"] = strings.TrimSpace(string(b))
		return e, t.takeExtras(o)
	}
	if err := m.makeOwn(ctx, t, o, config, &e); err != nil {
		return e, err
	}
	return e, durable.WriteFile(t.copied(), []byte(e.Packages["tree"]+"\n"), 0o644)
}

// copied marks a tree that is complete but not built yet; it holds the digest
// of its files.
func (t Tree) copied() string { return filepath.Join(t.Dir, "copied") }

// FinishOwn writes what the kernel is made of, read from the tree after it was
// built, and marks it as ready.
func (t Tree) FinishOwn() error {
	units, sources, err := readBuilt(t.Source())
	if err != nil {
		return err
	}
	if err := t.writeUnits(units); err != nil {
		return err
	}
	if err := durable.WriteFile(t.Sources(), []byte(strings.Join(sources, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	return durable.WriteFile(t.ready(), []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o644)
}

// Sources lists every file of an own tree that its objects are compiled from,
// one a line, sorted.
func (t Tree) Sources() string { return filepath.Join(t.Dir, "sources") }

// describe reads the parts and fills in the entry; it returns the config.
func (o Own) describe(e *catalog.Entry) ([]byte, error) {
	bad := func(code fault.Code, format string, args ...any) *fault.Error {
		return fault.New(fault.Invalid, code, format, args...)
	}
	if _, err := os.Stat(filepath.Join(o.Source, "scripts/livepatch/klp-build")); err != nil {
		return nil, bad("no_klp_build", "source tree %s: %w", o.Source, err).
			WithHint("name the top folder of a kernel source, 6.19 or newer: older ones have no scripts/livepatch/klp-build and cannot be built for here")
	}
	config, err := durable.ReadFile(o.Config, 4<<20)
	if err != nil {
		return nil, bad("no_config", "config: %w", err).WithHint("name the .config that the running kernel was built with: --config FILE")
	}
	id, err := identifyFile(o.Vmlinux)
	if err != nil {
		return nil, err
	}
	if err := hasSymbols(o.Vmlinux); err != nil {
		return nil, err
	}
	release, err := releaseOf(id.banner)
	if err != nil {
		return nil, err
	}
	e.Release, e.BuildID = release, id.build
	if o.Release != "" && o.Release != release {
		return nil, bad("other_release", "vmlinux %s is of release %s, not %s", o.Vmlinux, release, o.Release).
			WithHint("name the vmlinux of that kernel, or leave --release out")
	}
	if e.Compiler, err = compilerOf(id.banner); err != nil {
		return nil, err
	}
	if !strings.Contains(e.Compiler, "gcc") {
		return nil, bad("other_compiler", "vmlinux was built with %s", e.Compiler).WithHint("only kernels built with gcc are supported")
	}
	if e.CC, _, _ = strings.Cut(e.Compiler, " "); o.CC != "" {
		e.CC = o.CC
	}
	version, err := sourceVersion(filepath.Join(o.Source, "Makefile"))
	if err != nil {
		return nil, err
	}
	e.Version = version
	if rest, ok := strings.CutPrefix(string(release), version); !ok || rest != "" && rest[0] >= '0' && rest[0] <= '9' {
		return nil, bad("other_source", "source tree %s is version %s, vmlinux is %s", o.Source, version, release).
			WithHint("name the very source that this vmlinux was built from: --tree DIR")
	}
	if err := checkConfig(config, id, embedded(o.Vmlinux), o.Config); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(config)
	e.ConfigSHA256 = hex.EncodeToString(sum[:])
	// Two builds of one person often share their release; the build id
	// keeps their trees apart.
	e.Source, e.SourceV = "own", "own-"+id.build.Short()
	if e.Series = o.Series; e.Series == "" {
		e.Series = "own-" + seriesPattern.FindStringSubmatch(version + ".")[1]
	}
	return config, nil
}

var (
	bannerRelease = regexp.MustCompile(`^Linux version (\S+) `)
	makefileWord  = regexp.MustCompile(`(?m)^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION)[ \t]*=[ \t]*([A-Za-z0-9.~+_-]*)[ \t]*$`)
)

func releaseOf(banner string) (kernel.Release, error) {
	m := bannerRelease.FindStringSubmatch(banner)
	if m == nil {
		return "", fault.New(fault.Invalid, "bad_kernel_image", "vmlinux has no banner: %.200q", banner)
	}
	return kernel.ParseRelease(m[1])
}

// sourceVersion reads the version at the top of the kernel's Makefile.
func sourceVersion(makefile string) (string, error) {
	b, err := durable.ReadFile(makefile, 1<<20)
	if err != nil {
		return "", err
	}
	part := map[string]string{}
	for _, m := range makefileWord.FindAllSubmatch(b, -1) {
		if _, have := part[string(m[1])]; !have {
			part[string(m[1])] = string(m[2])
		}
	}
	if part["VERSION"] == "" || part["PATCHLEVEL"] == "" {
		return "", fault.New(fault.Invalid, "other_source", "%s says no version", makefile).WithHint("name the top folder of a kernel source: --tree DIR")
	}
	v := part["VERSION"] + "." + part["PATCHLEVEL"]
	if part["SUBLEVEL"] != "" {
		v += "." + part["SUBLEVEL"]
	}
	return v + part["EXTRAVERSION"], nil
}

// hasSymbols refuses a vmlinux without a symbol table: nothing could be proved.
func hasSymbols(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	stripped := func(what string) error {
		return fault.New(fault.Invalid, "stripped", "vmlinux %s is stripped: it has no %s", file, what).
			WithHint("name the vmlinux that the kernel's build left at the top of the build folder, not one taken out of a boot image")
	}
	symbols, err := f.Symbols()
	if err != nil || len(symbols) < 1000 {
		return stripped("symbol table")
	}
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) == elf.STT_FILE {
			return nil
		}
	}
	return stripped("symbols of type FILE, which tell functions of one name apart")
}

// checkCompiler looks whether this machine's compiler is the kernel's.
func checkCompiler(ctx context.Context, e catalog.Entry) error {
	out, err := exec.CommandContext(ctx, e.CC, "--version").Output()
	if err != nil {
		return fault.New(fault.NotFound, "no_compiler", "compiler %s of this kernel: %w", e.CC, err).
			WithHint("install it, or name its command: --cc COMMAND")
	}
	have, _, _ := strings.Cut(string(out), "\n")
	_, haveVersion, _ := strings.Cut(have, " ")
	_, wantVersion, _ := strings.Cut(e.Compiler, " ")
	if haveVersion != wantVersion {
		return fault.New(fault.Untrusted, "other_compiler", "the kernel was built with %q, %s is %q", e.Compiler, e.CC, have).
			WithHint("install that very compiler, or name its command: --cc COMMAND")
	}
	return nil
}

// makeOwn fills the tree's folder. What a broken run left is removed first.
func (m Maker) makeOwn(ctx context.Context, t Tree, o Own, config []byte, e *catalog.Entry) error {
	if err := os.RemoveAll(t.Dir); err != nil {
		return err
	}
	for _, d := range []string{t.Source(), filepath.Join(t.Dir, "modules")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := takeVmlinux(ctx, t, o); err != nil {
		return err
	}
	if err := t.takeExtras(o); err != nil {
		return err
	}
	if err := durable.WriteFile(t.Config(), config, 0o644); err != nil {
		return err
	}
	done := m.Step("copy the source tree")
	digest, files, err := copySource(o.Source, t.Source())
	if err != nil {
		return err
	}
	e.Packages["tree"] = "sha256 " + digest
	done(fmt.Sprintf("%d files", files))
	return m.configure(ctx, t, config, e)
}

// takeVmlinux keeps vmlinux with its symbols.
func takeVmlinux(ctx context.Context, t Tree, o Own) error {
	if out, err := exec.CommandContext(ctx, "strip", "--strip-debug", "--keep-file-symbols", "-o", t.Vmlinux(), o.Vmlinux).CombinedOutput(); err != nil {
		return fmt.Errorf("strip %s: %s: %w", o.Vmlinux, bytes.TrimSpace(out), err)
	}
	symbols, err := exec.CommandContext(ctx, "readelf", "-sW", t.Vmlinux()).Output()
	if err != nil {
		return fmt.Errorf("read symbols of %s: %w", t.Vmlinux(), err)
	}
	return durable.WriteFile(t.Symbols(), symbols, 0o644)
}

// takeExtras keeps what may also be named later: image and modules.
func (t Tree) takeExtras(o Own) error {
	if o.Image != "" {
		bz, err := durable.ReadFile(o.Image, 128<<20)
		if err != nil {
			return err
		}
		if _, err := sameKernel(bz, t.Vmlinux(), filepath.Base(o.Image)); err != nil {
			return err
		}
		if err := durable.WriteFile(t.Image(), bz, 0o644); err != nil {
			return err
		}
	}
	if o.Modules == "" {
		return nil
	}
	return t.takeOwnModules(o.Modules)
}

// configure gives the copy its config and asks the source whether it fits.
func (m Maker) configure(ctx context.Context, t Tree, config []byte, e *catalog.Entry) error {
	done := m.Step("configure the copy")
	file := filepath.Join(t.Source(), ".config")
	if err := durable.WriteFile(file, withoutKeys(config), 0o644); err != nil {
		return err
	}
	if err := sandbox.Own(file); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	for _, target := range []string{"listnewconfig", "syncconfig"} {
		res, err := sandbox.Run(ctx, sandbox.Command{Dir: t.Source(), Writable: []string{t.Source()}, Env: sandbox.BaseEnv(), Argv: Make(*e, target)})
		if err != nil {
			return err
		}
		said := bytes.TrimSpace(res.Output)
		switch {
		case res.Exit != 0:
			return fault.New(fault.Internal, "prepare", "make %s in %s ended with status %d: %s", target, t.Source(), res.Exit, lastLine(res.Output)).
				WithHint("are flex, bison, bc, libelf-dev, libssl-dev installed? in the source folder: tools/deps own")
		case target == "listnewconfig" && len(said) > 0:
			return fault.New(fault.Invalid, "other_source", "the config does not answer what this source asks: %.300s", said).
				WithHint("name the config and the source that vmlinux was built from; a config of another version does not do")
		}
	}
	done("")
	return nil
}
