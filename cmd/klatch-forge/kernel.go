// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"regexp"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/publog"
	"klatch/internal/forge/sign"
	"klatch/internal/kernel"
	"klatch/internal/trust"
)

// invalid makes an error of kind invalid; the second call adds the hint.
func invalid(format string, args ...any) func(hint string) error {
	return func(hint string) error {
		return fault.New(fault.Invalid, "usage", format, args...).WithHint("%s", hint)
	}
}

func initCommand() *cobra.Command {
	var profile, publisher string
	c := &cobra.Command{
		Use:   "init DIR --profile lab|small|full",
		Short: "Make a publisher's data folder",
		Long: `Makes DIR with catalog, queue, policy, keys, an empty repository, and
trust.json, the anchor that machines and servers get.

Profile lab has one key of each kind, in files of this machine; machines refuse
it unless their owner allows it. Profile small needs two of two keys of targets,
releases and manifests and two of three of the root; profile full two of three,
three of five of the root, and two builders for each livepatch. All are made
here first. Then each holder makes a key of their own and replaces one of these:
klatch-forge keys, and docs/howto/keys-and-ceremonies.md.

evidence.toml says who may sign statements about livepatches. Outside of profile
lab a reviewer is missing: that person makes a key with "evidence key".`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := datadir.Make(args[0], datadir.Policy{Publisher: publisher, Profile: trust.Profile(profile)})
			if err == nil {
				err = sign.MakeKeys(cmd.Context(), d, time.Now())
			}
			if err == nil && d.Policy.Profile == trust.Lab {
				_, err = publog.Init(d, publog.Witnesses{})
			}
			if err != nil {
				return cli.Cannot(err, "make the data folder %s", args[0])
			}
			out(cmd, "data folder  %s (publisher %s, profile %s)\n", args[0], publisher, profile)
			out(cmd, "anchor       %s: install it on machines and servers\n", d.Anchor())
			out(cmd, "module key   %s: enroll it where Secure Boot is on\n", sign.ModuleCertFile(d))
			if d.Policy.Profile != trust.Lab {
				out(cmd, "log          none yet; with your witnesses: klatch-forge --dir %s log init --witness \"VKEY URL\"\n", args[0])
			}
			out(cmd, "next         klatch-forge --dir %s kernel add --release $(uname -r)\n", args[0])
			return nil
		},
	}
	c.Flags().StringVar(&profile, "profile", "", "lab, small or full (needed)")
	c.Flags().StringVar(&publisher, "publisher", "klatch-lab", "your name in every key, such as example.org")
	_ = c.MarkFlagRequired("profile")
	return c
}

func kernelCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "kernel", Short: "Kernels that livepatches are made for"}
	c.AddCommand(kernelAdd(o), kernelList(o), kernelAvailable(o), kernelSupport(o), kernelEnd(o), kernelNotice(o))
	return c
}

func kernelAdd(o *options) *cobra.Command {
	var distro, release, source, cflags string
	var own kerneltree.Own
	var ccache string
	var asJSON bool
	c := &cobra.Command{
		Use:   "add --release RELEASE | --tree DIR --config FILE --vmlinux FILE",
		Short: "Add a kernel of a distribution, or one of your own, to the catalog",
		Long: `Gets image, headers, source and symbols of exactly that kernel from the
distribution's archive, through apt with a state folder of its own: nothing is
installed, the host's sources stay as they are, signatures are checked. Proves
that image and symbols are one compiled kernel, prepares the source tree in the
cache, and writes the catalog entry. A second call finds everything there.

Kernels of Debian 13 are compiled in a small root folder with that release's own
compiler. The first of them makes it, with debootstrap, as root; the others
share it.

With --tree, a kernel that you built yourself: source (Linux 6.19 or newer, for
its scripts/livepatch/klp-build), config and vmlinux must be those of the kernel
that runs. They are read, never changed; private keys are not copied. The
unpatched kernel is built once more, which takes as long as any kernel build,
and compared with vmlinux function by function. docs/howto/own-kernel.md tells
the whole way.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var e catalog.Entry
			var err error
			if own.Source != "" {
				own.Release = kernel.Release(release)
				e, err = addOwnKernel(cmd, o, own, ccache)
			} else {
				e, err = addKernel(cmd, o, distro, release, source, cflags)
			}
			if err != nil {
				return cli.Cannot(err, "add kernel %s", cmp.Or(release, own.Vmlinux))
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"release": e.Release, "distro": e.Distro, "arch": e.Arch,
					"build_id": e.BuildID, "series": e.Series, "package_version": e.Version, "source_version": e.SourceV,
					"compiler": e.Compiler, "config_sha256": e.ConfigSHA256})
			}
			out(cmd, "kernel    %s (%s, package %s)\nbuild id  %s\ncompiler  %s\nqueue     %s\n", e.Release, e.Distro, e.Version, e.BuildID, e.Compiler, e.Series)
			return nil
		},
	}
	distroFlag(c, &distro)
	c.Flags().StringVar(&release, "release", "", "kernel release, as uname -r prints it (needed without --tree)")
	c.Flags().StringVar(&source, "source-version", "", "take another version of the source package; the match proof will say whether it fits")
	c.Flags().StringVar(&cflags, "extra-cflags", "", "add compiler flags; the match proof will say whether they fit")
	c.Flags().BoolVar(&asJSON, "json", false, "print the entry as JSON")
	c.Flags().StringVar(&own.Source, "tree", "", "your own kernel: its source, read only")
	c.Flags().StringVar(&own.Config, "config", "", "your own kernel: its .config (needed with --tree)")
	c.Flags().StringVar(&own.Vmlinux, "vmlinux", "", "your own kernel: the vmlinux that runs, with symbols (needed with --tree)")
	c.Flags().StringVar(&own.Image, "image", "", "your own kernel: the bzImage that boots, for tests in the lab")
	c.Flags().StringVar(&own.Modules, "modules", "", "your own kernel: the folder of its modules, to prove fixes of module code")
	c.Flags().StringVar(&own.CC, "cc", "", "your own kernel: the compiler's command (default as vmlinux says)")
	c.Flags().StringVar(&ccache, "ccache", "", "your own kernel: the ccache folder of its build, read only, to save most of the second one")
	c.Flags().StringVar(&own.Series, "series", "", "your own kernel: name of its queue (default own-7.2 and the like)")
	c.MarkFlagsOneRequired("release", "tree")
	c.MarkFlagsMutuallyExclusive("tree", "source-version")
	c.MarkFlagsMutuallyExclusive("tree", "extra-cflags")
	return c
}

// seriesName is what may name a folder below queue/.
var seriesName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

func addKernel(cmd *cobra.Command, o *options, distro, release, source, cflags string) (catalog.Entry, error) {
	r, err := kernel.ParseRelease(release)
	if err != nil {
		return catalog.Entry{}, err
	}
	d, err := o.data()
	if err != nil {
		return catalog.Entry{}, err
	}
	m, err := o.maker(cmd, distro)
	if err != nil {
		return catalog.Entry{}, err
	}
	e, err := m.Add(cmd.Context(), r, source)
	if err != nil {
		return e, err
	}
	e.ExtraCFlags = cflags
	return e, catalog.Save(d.Path, e)
}

func kernelList(o *options) *cobra.Command {
	var asJSON bool
	var ending int
	c := &cobra.Command{
		Use: "list", Short: "List the kernels of the catalog", Args: cobra.NoArgs,
		Long: `Lists the kernels and until when each is supported. With --ending N, only those
whose support has ended or ends within N days: the forecast for the fleet. Then
the exit status is 4 where there is one, because somebody must act.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "list kernels")
			}
			all, err := catalog.List(d.Path)
			if err != nil {
				return cli.Cannot(err, "list kernels")
			}
			type listed struct {
				kernel.Build
				Support catalog.State  `json:"support"`
				Until   string         `json:"until,omitempty"`
				Instead kernel.Release `json:"instead,omitempty"`
			}
			kernels := []listed{}
			var lines []string
			for _, e := range all {
				state, text := supportText(e.Support, time.Now())
				if _, days, err := e.Support.At(time.Now()); ending > 0 && (err != nil || state == catalog.Unknown || state != catalog.Ended && days > ending) {
					continue
				}
				kernels = append(kernels, listed{e.Build(), state, e.Support.Until, e.Support.Instead})
				lines = append(lines, fmt.Sprintf("%-32s %-12s %-14s build %s  %s\n", e.Release, e.Distro, e.Version, e.BuildID.Short(), text))
			}
			if asJSON {
				err = cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"kernels": kernels})
			} else {
				for _, l := range lines {
					out(cmd, "%s", l)
				}
			}
			if err == nil && ending > 0 && len(kernels) > 0 {
				return cli.ExitWith(4)
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print as JSON")
	c.Flags().IntVar(&ending, "ending", 0, "only those that have ended, or end within so many days")
	return c
}

func kernelAvailable(o *options) *cobra.Command {
	var distro, flavor string
	c := &cobra.Command{
		Use: "available", Short: "List the kernels that the distribution's archive has now", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, _, err := o.openArchive(cmd.Context(), distro)
			if err != nil {
				return cli.Cannot(err, "read the archive")
			}
			names, err := a.Kernels(cmd.Context(), flavor)
			if err != nil {
				return cli.Cannot(err, "read the archive")
			}
			for _, n := range names {
				out(cmd, "%s\n", n)
			}
			return nil
		},
	}
	distroFlag(c, &distro)
	c.Flags().StringVar(&flavor, "flavor", "cloud-amd64", "end of the release's name")
	return c
}
