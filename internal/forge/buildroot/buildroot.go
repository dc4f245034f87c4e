// SPDX-License-Identifier: Apache-2.0

// Package buildroot makes the small root folders in which kernels of another
// release than the host's are compiled: a minimal Debian with that release's
// own compiler. A root folder is made once, is the same for all kernels of its
// release, and is never changed afterwards; package sandbox runs programs in
// it.
//
// Trust: apt says which packages an empty system needs and fetches them,
// checking signatures and digests as for kernels (package archive). debootstrap
// then gets a mirror on disk that holds exactly these files, in name spaces
// without any network: it can install nothing that apt did not vouch for.
//
// Start with Maker.Make. Find is what a build calls.
package buildroot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/sandbox"
)

// format is part of every digest: raise it when the code makes another folder
// from the same packages.
const format = 1

// Spec says what root folder is wanted.
type Spec struct {
	Name     string   // such as debian-13
	Suite    string   // code name, such as trixie
	Packages []string // that a build needs; apt adds what these need
	// Toolchain are those of Packages, or of what they need, whose version
	// reaches the code that is made. A catalog entry holds their versions.
	Toolchain []string
}

// Debian13 is the root folder of Debian 13's kernels. dwarves is in it because
// the version of pahole is part of the kernel's configuration; mawk because
// debootstrap installs it by name.
func Debian13() Spec {
	return Spec{Name: "debian-13", Suite: "trixie",
		Packages: []string{"gcc-14", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "python3", "kmod", "cpio",
			"rsync", "xz-utils", "zstd", "gawk", "mawk", "patch", "diffutils", "binutils", "dwarves"},
		Toolchain: []string{"gcc-14", "binutils", "dwarves"}}
}

// Root is a finished root folder.
type Root struct {
	Dir      string
	Name     string
	Digest   string            // of suite, packages and versions
	Packages map[string]string // name to version, of all that is in it
	Made     time.Time
}

// Versions are those of the given packages.
func (r Root) Versions(names []string) map[string]string {
	m := map[string]string{}
	for _, n := range names {
		m[n] = r.Packages[n]
	}
	return m
}

// about is stored beside a root folder, and says that it is whole.
type about struct {
	Name     string            `json:"name"`
	Digest   string            `json:"digest"`
	Packages map[string]string `json:"packages"`
	Made     time.Time         `json:"made"`
}

const (
	rootName  = "root"
	aboutName = "buildroot.json"
	maxAbout  = 1 << 20
)

func folder(cache string) string { return filepath.Join(cache, "buildroots") }

// Find returns the newest root folder of a name that has the given versions of
// the given packages.
func Find(cache, name string, versions map[string]string) (Root, error) {
	found, err := filepath.Glob(filepath.Join(folder(cache), name+"_*", aboutName))
	if err != nil {
		return Root{}, err
	}
	var best Root
	var other []string
	for _, f := range found {
		r, err := read(f)
		if err != nil {
			return Root{}, err
		}
		have := r.Versions(slices.Collect(maps.Keys(versions)))
		switch {
		case r.Name != name:
		case !maps.Equal(have, versions):
			other = append(other, list(have))
		case best.Dir == "" || r.Made.After(best.Made):
			best = r
		}
	}
	if best.Dir != "" {
		return best, nil
	}
	why := "there is none in the cache"
	if len(other) > 0 {
		why = "the cache has one with " + strings.Join(other, ", and one with ")
	}
	return Root{}, fault.New(fault.NotFound, "no_buildroot", "root folder %s with %s: %s", name, list(versions), why).
		WithHint("klatch-forge kernel add --distro %s makes it, if the archive still has these versions", name)
}

func list(versions map[string]string) string {
	var s []string
	for _, n := range slices.Sorted(maps.Keys(versions)) {
		s = append(s, n+" "+versions[n])
	}
	return strings.Join(s, ", ")
}

func read(file string) (Root, error) {
	b, err := durable.ReadFile(file, maxAbout)
	if err != nil {
		return Root{}, err
	}
	var a about
	if err := json.Unmarshal(b, &a); err != nil {
		return Root{}, fmt.Errorf("read %s: %w", file, err)
	}
	return Root{Dir: filepath.Join(filepath.Dir(file), rootName), Name: a.Name, Digest: a.Digest, Packages: a.Packages, Made: a.Made}, nil
}

// Step tells a person what is being done; it returns the function that says
// that it is over.
type Step func(what string) (done func(note string))

// Maker makes root folders.
type Maker struct {
	Archive  *archive.Archive // of the same suite as the spec
	Cache    string
	Step     Step
	Progress archive.Progress
}

// Make makes a root folder, or finds it made. versions, if any, are wanted of
// single packages; a folder that has them is used, however old the rest of it
// is, since nothing else reaches the code that is made in it.
func (m Maker) Make(ctx context.Context, s Spec, versions map[string]string) (Root, error) {
	if r, err := Find(m.Cache, s.Name, versions); err == nil || fault.KindOf(err) != fault.NotFound {
		return r, err
	}
	if os.Getuid() != 0 {
		return Root{}, fault.New(fault.Denied, "needs_root", "make root folder %s: debootstrap needs root", s.Name).
			WithHint("run this command once as root, or with a cache that has the folder")
	}
	if err := os.MkdirAll(folder(m.Cache), 0o755); err != nil {
		return Root{}, err
	}
	unlock, err := durable.Lock(filepath.Join(folder(m.Cache), "."+s.Name+".lock"))
	if err != nil {
		return Root{}, err
	}
	defer unlock()                                             //nolint:errcheck // nothing was written
	if r, err := Find(m.Cache, s.Name, versions); err == nil { // somebody else was faster
		return r, nil
	}
	ps, err := m.Archive.Closure(ctx, append([]string{"apt", "?essential"}, s.Packages...)...)
	if err != nil {
		return Root{}, err
	}
	r := Root{Name: s.Name, Digest: digest(s, ps), Packages: map[string]string{}}
	for _, p := range ps {
		r.Packages[p.Name] = p.Version
	}
	if have := r.Versions(slices.Collect(maps.Keys(versions))); !maps.Equal(have, versions) {
		return Root{}, fault.New(fault.NotFound, "no_buildroot", "root folder %s: wanted %s, the archive has %s", s.Name, list(versions), list(have)).
			WithHint("the kernel was built with tools that the archive no longer has; keep the cache, or take a newer kernel")
	}
	if err := m.download(ctx, s, ps); err != nil {
		return Root{}, err
	}
	return m.build(ctx, s, ps, r)
}

func (m Maker) download(ctx context.Context, s Spec, ps []archive.Package) error {
	missing, err := m.Archive.Missing(ps)
	if err != nil || missing == 0 {
		return err
	}
	done := m.Step(fmt.Sprintf("download %d packages of root folder %s", len(ps), s.Name))
	if err := m.Archive.Download(ctx, ps, m.Progress); err != nil {
		return err
	}
	done(fmt.Sprintf("%d MB", (missing+999_999)/1_000_000))
	return nil
}

// build makes the folder beside its final place; it appears whole, with its
// description, or not at all. What a killed run left is removed first.
func (m Maker) build(ctx context.Context, s Spec, ps []archive.Package, r Root) (Root, error) {
	torn, err := filepath.Glob(filepath.Join(folder(m.Cache), ".making-"+s.Name+"-*"))
	if err != nil {
		return r, err
	}
	for _, t := range torn {
		if err := os.RemoveAll(t); err != nil {
			return r, err
		}
	}
	tmp, err := os.MkdirTemp(folder(m.Cache), ".making-"+s.Name+"-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // scratch; what must stay was renamed
	out := filepath.Join(tmp, "out")
	r.Dir = filepath.Join(out, rootName)
	for _, d := range []string{out, r.Dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return r, err
		}
	}
	done := m.Step("make root folder " + s.Name + " with debootstrap")
	mirror := filepath.Join(tmp, "mirror")
	if err := writeMirror(mirror, s.Suite, ps, m.Archive.File); err != nil {
		return r, err
	}
	if err := debootstrap(ctx, s, mirror, r.Dir); err != nil {
		return r, err
	}
	if err := installed(r); err != nil {
		return r, err
	}
	if err := trim(r.Dir); err != nil {
		return r, err
	}
	r.Made = time.Now().UTC().Truncate(time.Second)
	text, err := json.MarshalIndent(about{r.Name, r.Digest, r.Packages, r.Made}, "", " ")
	if err != nil {
		return r, err
	}
	if err := durable.WriteFile(filepath.Join(out, aboutName), append(text, '\n'), 0o644); err != nil {
		return r, err
	}
	final := filepath.Join(folder(m.Cache), s.Name+"_"+r.Digest[:16])
	if err := os.Rename(out, final); err != nil {
		return r, err
	}
	r.Dir = filepath.Join(final, rootName)
	done(fmt.Sprintf("%d packages", len(ps)))
	return r, durable.SyncDir(folder(m.Cache))
}

// digest names what is in a root folder.
func digest(s Spec, ps []archive.Package) string {
	h := sha256.New()
	fmt.Fprintf(h, "klatch-buildroot/%d\n%s\n", format, s.Suite) //nolint:errcheck // a hash takes everything
	for _, p := range ps {
		fmt.Fprintf(h, "%s %s %s\n", p.Name, p.Version, p.SHA256) //nolint:errcheck // as above
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Compiler is the first line that a compiler in the root folder says of
// itself.
func (r Root) Compiler(ctx context.Context, cc string) (string, error) {
	res, err := sandbox.Run(ctx, sandbox.Command{Root: r.Dir, Dir: "/", Argv: []string{cc, "--version"}})
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("exit status %d: %s", res.Exit, bytes.TrimSpace(res.Output))
	}
	if err != nil {
		return "", fault.New(fault.Internal, "no_compiler", "compiler %s in root folder %s: %w", cc, r.Name, err).
			WithHint("this kernel was built by another compiler than its release's")
	}
	line, _, _ := strings.Cut(string(res.Output), "\n")
	return line, nil
}

// Remove throws a root folder away.
func (r Root) Remove() error {
	dir := filepath.Dir(r.Dir)
	if err := os.Remove(filepath.Join(dir, aboutName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(dir)
}
