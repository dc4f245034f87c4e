// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/buildroot"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/kernel"
)

// options are the flags that every command shares.
type options struct {
	dir, cache string
	quiet      bool
}

func (o *options) data() (datadir.Dir, error) {
	abs, err := filepath.Abs(o.dir)
	if err != nil {
		return datadir.Dir{}, err
	}
	return datadir.Open(abs)
}

func (o *options) cacheDir() (string, error) {
	if o.cache != "" {
		return filepath.Abs(o.cache)
	}
	return datadir.CacheDir()
}

// console tells steps on standard error, each with the time it took.
type console struct {
	w io.Writer
}

func (o *options) console(cmd *cobra.Command) console {
	if o.quiet {
		return console{io.Discard}
	}
	return console{cmd.ErrOrStderr()}
}

// step prints a line when a step begins and completes it when it ends.
func (c console) step(what string) func(note string) {
	start := time.Now()
	fmt.Fprintf(c.w, "  %s …\n", what) //nolint:errcheck // decoration
	return func(note string) {
		if note != "" {
			note = ": " + note
		}
		fmt.Fprintf(c.w, "  %s%s (%.1f s)\n", what, note, time.Since(start).Seconds()) //nolint:errcheck // decoration
	}
}

func (c console) say(format string, args ...any) {
	fmt.Fprintf(c.w, "  "+format+"\n", args...) //nolint:errcheck // decoration
}

// progress prints at most one line per second and package.
func (c console) progress() archive.Progress {
	var last time.Time
	return func(what string, done, total int64) {
		if what == "" || total == 0 || time.Since(last) < time.Second {
			return
		}
		last = time.Now()
		fmt.Fprintf(c.w, "    %3d %% of %d MB  %s\n", done*100/total, total/1_000_000, what) //nolint:errcheck // decoration
	}
}

// release is a release of Debian that we make livepatches for.
type release struct {
	distro kernel.Distro
	suite  string
	tools  []string // suites besides its own, for kpatch-build
	state  string   // folder of apt's state in the cache
	root   *buildroot.Spec
}

// debianReleases maps what --distro takes to a release. Debian 12 has no
// kpatch-build, so its comes from the release after it, and its kernels are
// compiled with this host's programs; later ones in a root folder.
func debianReleases() map[string]release {
	trixie := buildroot.Debian13()
	bookworm := release{"debian-12", "bookworm", []string{"trixie"}, "apt", nil}
	return map[string]release{
		"debian":    bookworm,
		"debian-12": bookworm,
		"debian-13": {"debian-13", "trixie", nil, "apt-debian-13", &trixie},
	}
}

func distroNames() []string { return slices.Sorted(maps.Keys(debianReleases())) }

func distroFlag(cmd *cobra.Command, to *string) {
	cmd.Flags().StringVar(to, "distro", "debian", "distribution: debian-12 (also called debian) or debian-13")
	_ = cmd.RegisterFlagCompletionFunc("distro", cobra.FixedCompletions(distroNames(), cobra.ShellCompDirectiveNoFileComp))
}

// openArchive prepares apt's own state for Debian's archive.
func (o *options) openArchive(ctx context.Context, distro string) (*archive.Archive, release, error) {
	d, ok := debianReleases()[distro]
	if !ok {
		return nil, d, invalid("distribution %q is unknown", distro)("use --distro with one of " + strings.Join(distroNames(), ", "))
	}
	cache, err := o.cacheDir()
	if err != nil {
		return nil, d, err
	}
	suites, err := archive.HostSuites(ctx, d.suite, d.tools...)
	if err != nil {
		return nil, d, err
	}
	a, err := archive.Open(filepath.Join(cache, d.state), suites)
	if err != nil {
		return nil, d, err
	}
	if !o.quiet {
		a.Say = console{os.Stderr}.say
	}
	return a, d, a.Update(ctx, false)
}

func (o *options) maker(cmd *cobra.Command, distro string) (kerneltree.Maker, error) {
	a, d, err := o.openArchive(cmd.Context(), distro)
	if err != nil {
		return kerneltree.Maker{}, err
	}
	cache, err := o.cacheDir()
	if err != nil {
		return kerneltree.Maker{}, err
	}
	c := o.console(cmd)
	return kerneltree.Maker{Archive: a, Cache: cache, Distro: d.distro, Root: d.root, Step: c.step, Progress: c.progress(), Say: c.say}, nil
}

func kernelFlag(cmd *cobra.Command, to *string) {
	optionalKernelFlag(cmd, to)
	cmd.Flags().Lookup("kernel").Usage += " (needed)"
	_ = cmd.MarkFlagRequired("kernel")
}

func optionalKernelFlag(cmd *cobra.Command, to *string) {
	cmd.Flags().StringVar(to, "kernel", "", "kernel release, as uname -r prints it")
	_ = cmd.RegisterFlagCompletionFunc("kernel", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		dir, err := cmd.Flags().GetString("dir")
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		files, _ := filepath.Glob(filepath.Join(dir, "catalog", "*", "*.toml"))
		var names []string
		for _, f := range files {
			names = append(names, strings.TrimSuffix(filepath.Base(f), ".toml"))
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
}

func out(cmd *cobra.Command, format string, args ...any) {
	fmt.Fprint(cmd.OutOrStdout(), cli.Clean(fmt.Sprintf(format, args...))) //nolint:errcheck // standard output
}

func readable(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return f.Close()
}
