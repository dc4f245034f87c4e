// SPDX-License-Identifier: Apache-2.0

// Package debian makes the full guest: a disk image with Debian, systemd and
// one stock kernel package, as close to a real machine as a few seconds of
// boot time allow. It needs root, debootstrap, mke2fs and the network; the
// mirror and its keys are the ones that this machine's apt uses.
//
// Start with Build. Images are kept in a cache by a digest of their recipe
// and are never changed afterwards; a lab machine works on its own layer.
package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"klatch/internal/forge/lab"
)

// format is part of every recipe: raise it when the code makes another image
// from the same input.
const format = 1

// Config says what image is wanted.
type Config struct {
	// Suite is a Debian suite that this machine's apt knows: bookworm.
	Suite string
	// KernelDeb is the linux-image package, as `apt-get download` gives it.
	KernelDeb string
	// Packages come in addition to the base ones.
	Packages []string
	// Cache keeps finished images.
	Cache string
	// Progress is told about each step when it begins and when it ends; nil
	// is allowed.
	Progress func(Step)
}

// Step is one step of a build.
type Step struct {
	Name string // one word
	What string // on what
	Done bool
	Took time.Duration // when Done
}

// Image is a finished image.
type Image struct {
	// Root is the raw disk image, Kernel the kernel in it, Initrd its
	// initramfs if the kernel needs one.
	Root, Kernel, Initrd string
	// Release is what uname -r says in the guest.
	Release string
	// Digest of the recipe.
	Digest string
	// Cached: nothing had to be built.
	Cached bool
}

// Spec is a machine with this image; the caller adds what it wants.
func (i Image) Spec(name string) lab.Spec {
	return lab.Spec{Name: name, Kernel: i.Kernel, Initrd: i.Initrd, Root: i.Root,
		MemoryMiB: 1024, Network: lab.Isolated, BootTimeout: 4 * time.Minute}
}

// recipe is everything that decides what an image holds. The mirror's own
// state is not in it: an image stays as old as it was built.
type recipe struct {
	Format    int      `json:"format"`
	Suite     string   `json:"suite"`
	Packages  []string `json:"packages"`
	KernelDeb string   `json:"kernel_deb_sha256"`
	Settings  string   `json:"settings_sha256"`
}

// basePackages on top of debootstrap's minbase variant.
func basePackages() []string {
	return []string{"systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps", "initramfs-tools", "ca-certificates"}
}

// Names in an image's folder.
const (
	rootName   = "root.ext4"
	kernelName = "vmlinuz"
	initrdName = "initrd.img"
	aboutName  = "image.json"
)

// about is stored beside the image; it is written last.
type about struct {
	Recipe  recipe    `json:"recipe"`
	Release string    `json:"release"`
	Initrd  bool      `json:"initrd"`
	Built   time.Time `json:"built"`
}

// Build gives the image for the config, from the cache or by building it.
// It may be called concurrently, also by several programs: the first finished
// image stays.
func Build(ctx context.Context, cfg Config) (Image, error) {
	rec, err := newRecipe(cfg)
	if err != nil {
		return Image{}, lab.Brokenf(err, "build debian guest")
	}
	digest, err := rec.digest()
	if err != nil {
		return Image{}, lab.Brokenf(err, "build debian guest")
	}
	dir := filepath.Join(cfg.Cache, "debian-"+cfg.Suite+"-"+digest[:16])
	if img, err := open(dir, digest); err == nil {
		img.Cached = true
		return img, nil
	}
	if err := build(ctx, cfg, rec, dir); err != nil {
		return Image{}, lab.Brokenf(err, "build debian guest %s", cfg.Suite)
	}
	img, err := open(dir, digest)
	return img, lab.Brokenf(err, "open new debian guest")
}

func newRecipe(cfg Config) (recipe, error) {
	if cfg.Suite == "" || cfg.Cache == "" {
		return recipe{}, errors.New("suite and cache must be given")
	}
	sum, err := fileSum(cfg.KernelDeb)
	if err != nil {
		return recipe{}, err
	}
	packages := append(basePackages(), cfg.Packages...)
	slices.Sort(packages)
	return recipe{Format: format, Suite: cfg.Suite, Packages: slices.Compact(packages),
		KernelDeb: sum, Settings: settingsSum()}, nil
}

func (r recipe) digest() (string, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

func open(dir, digest string) (Image, error) {
	b, err := os.ReadFile(filepath.Join(dir, aboutName))
	if err != nil {
		return Image{}, err
	}
	var a about
	if err := json.Unmarshal(b, &a); err != nil {
		return Image{}, fmt.Errorf("read %s: %w", filepath.Join(dir, aboutName), err)
	}
	img := Image{Root: filepath.Join(dir, rootName), Kernel: filepath.Join(dir, kernelName), Release: a.Release, Digest: digest}
	files := []string{img.Root, img.Kernel}
	if a.Initrd {
		img.Initrd = filepath.Join(dir, initrdName)
		files = append(files, img.Initrd)
	}
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			return Image{}, err
		}
	}
	return img, nil
}

// build makes the image in a folder beside the final one and renames it.
func build(ctx context.Context, cfg Config, rec recipe, dir string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("debootstrap needs root")
	}
	if err := os.MkdirAll(cfg.Cache, 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(cfg.Cache, ".building-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	b := &builder{cfg: cfg, tree: filepath.Join(tmp, "tree"), out: filepath.Join(tmp, "image")}
	if err := os.Mkdir(b.out, 0o755); err != nil {
		return err
	}
	if err := b.run(ctx, rec); err != nil {
		return err
	}
	a := about{Recipe: rec, Release: b.release, Initrd: b.initrd, Built: time.Now().UTC().Truncate(time.Second)}
	text, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	// The folder is renamed as a whole, so a torn file never gets its name.
	if err := os.WriteFile(filepath.Join(b.out, aboutName), append(text, '\n'), 0o644); err != nil { //nolint:forbidigo // see above
		return err
	}
	if err := os.Rename(b.out, dir); err != nil {
		if _, statErr := os.Stat(filepath.Join(dir, aboutName)); statErr != nil {
			return err
		}
		// Somebody else was faster; theirs is as good.
	}
	return nil
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
