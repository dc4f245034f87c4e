// SPDX-License-Identifier: Apache-2.0

// Package catalog is the publisher's list of supported kernel builds: one
// reviewed TOML file each, saying which compiled kernel it is and from what a
// livepatch for it is built. The files are data in git; the trees and packages
// they name are in the cache and can be fetched again.
package catalog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// Entry is one supported kernel build.
type Entry struct {
	Release  kernel.Release `toml:"release"`
	Distro   kernel.Distro  `toml:"distro"`
	Arch     kernel.Arch    `toml:"arch"`
	BuildID  kernel.BuildID `toml:"build_id"`
	Series   string         `toml:"series"`          // names the queue, such as debian-6.1
	Version  string         `toml:"package_version"` // of the kernel image package
	Source   string         `toml:"source_package"`
	SourceV  string         `toml:"source_version"` // equals Version unless somebody chose otherwise
	CC       string         `toml:"cc"`             // the compiler's command
	Compiler string         `toml:"compiler"`       // its first version line, as the kernel's banner has it
	// Buildroot names the root folder whose programs compile this kernel, such
	// as debian-13; empty means this host's. Toolchain says which versions of
	// them, by package: what reaches the code.
	Buildroot string            `toml:"buildroot,omitempty" json:",omitempty"`
	Toolchain map[string]string `toml:"toolchain,omitempty" json:",omitempty"`
	// ConfigSHA256 is the digest of the distribution's own .config.
	ConfigSHA256 string `toml:"config_sha256"`
	// ExtraCFlags are added to every compilation. Empty for a distribution
	// kernel; the match proof says whether they were right.
	ExtraCFlags string `toml:"extra_cflags,omitempty"`
	// Builder is the driver that builds for this kernel; empty means objbuild.
	Builder string `toml:"builder,omitempty" json:"Builder,omitempty"`
	// StructSizes are what create-diff-object wants to know of this kernel,
	// in bytes, by the name of its environment variable.
	StructSizes map[string]int `toml:"struct_sizes"`
	// Support is kept from the plan's digest.
	Support Support `toml:"support,omitempty" json:"-"`
	// Packages says where everything came from: name to "version sha256".
	Packages map[string]string `toml:"packages"`
}

// Build is the kernel build that the entry describes.
func (e Entry) Build() kernel.Build {
	return kernel.Build{Distro: e.Distro, Arch: e.Arch, Release: e.Release, ID: e.BuildID}
}

// maxEntry limits a catalog file, in bytes.
const maxEntry = 64 << 10

func path(dir string, d kernel.Distro, r kernel.Release) string {
	return filepath.Join(dir, "catalog", string(d), string(r)+".toml")
}

// Save writes an entry into the publisher's data folder.
func Save(dir string, e Entry) error {
	p := path(dir, e.Distro, e.Release)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	if err := keepSupport(p, &e); err != nil {
		return err
	}
	b, err := toml.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode catalog entry of %s: %w", e.Release, err)
	}
	return durable.WriteFile(p, b, 0o644)
}

// Load finds the entry of a kernel release in any distribution.
func Load(dir string, r kernel.Release) (Entry, error) {
	found, err := filepath.Glob(filepath.Join(dir, "catalog", "*", string(r)+".toml"))
	if err != nil {
		return Entry{}, err
	}
	if len(found) == 0 {
		return Entry{}, fault.New(fault.NotFound, "no_kernel", "kernel %s is not in the catalog", r).
			WithHint("add it: klatch-forge kernel add --distro debian --release %s", r)
	}
	return read(found[0])
}

// List returns all entries, sorted by path.
func List(dir string) ([]Entry, error) {
	var all []Entry
	root := filepath.Join(dir, "catalog")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(p) != ".toml" {
			return err
		}
		e, err := read(p)
		all = append(all, e)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return all, err
}

func read(p string) (Entry, error) {
	var e Entry
	b, err := durable.ReadFile(p, maxEntry)
	if err != nil {
		return e, err
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&e); err != nil {
		return e, fault.New(fault.Invalid, "bad_catalog", "catalog file %s: %w", p, err)
	}
	if e.Release == "" || e.BuildID.IsZero() {
		return e, fault.New(fault.Invalid, "bad_catalog", "catalog file %s: no release or no build id", p)
	}
	return e, nil
}
