// SPDX-License-Identifier: Apache-2.0

// Klatch-forge is the publisher's tool: it turns fixes into one signed,
// cumulative livepatch per kernel build and publishes it. Wiring only; start
// reading in internal/forge.
package main

import (
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/lab/guest"
	"klatch/internal/forge/sandbox"
)

// version is stamped by the build.
var version = "unknown"

func main() {
	if guest.IsInit() {
		guest.Main()
	}
	sandbox.Child()
	// Builds run as another user, who must read what we make for them. What
	// nobody else may read, such as keys, is made with its own mode.
	syscall.Umask(0o022)
	os.Exit(cli.Run(root()))
}

func root() *cobra.Command {
	c := &cobra.Command{
		Use:   "klatch-forge",
		Short: "Make livepatches: from a kernel fix to a published, signed module",
		Long: `klatch-forge is the publisher's tool. In this order:

  init DIR          make a data folder: catalog, queue, policy, keys
  kernel add        get a distribution kernel: image, source, config, symbols
  feed, triage      which CVEs this kernel has, and which deserve a livepatch
  import-delta      take every fix up to a newer source package, with a ledger
  queue import      take a fix from a newer source package (or: queue add a diff)
  queue check       add a program that shows whether the flaw is there
  queue lint        what a build will surely refuse, without building
  build             one cumulative livepatch from the queue, or a refusal that says why
  test              try it on that kernel in a virtual machine
  confirm           as the second builder, make it again: the same bytes
  review            as somebody else than the author, read and approve the source patches
  sign, publish     sign what has all its evidence, put it into the repository
  evidence verify   as a stranger, check what is published
  log               the transparency log of what was published, and its witnesses
  keys, recall      who may sign what, until when; take a livepatch back

Only publishers need it; machines run klatch, servers klatch-server.`,
		Example: `  klatch-forge init data --profile lab
  klatch-forge --dir data kernel add --release 6.1.0-50-cloud-amd64
  klatch-forge --dir data queue import --kernel 6.1.0-50-cloud-amd64 --to 6.1.192-2 \
      --file net/unix/af_unix.c --function unix_ioctl --fixes CVE-2026-52928
  klatch-forge --dir data build --kernel 6.1.0-50-cloud-amd64`,
		Version: version,
	}
	o := &options{}
	c.PersistentFlags().StringVar(&o.dir, "dir", envOr("KLATCH_FORGE_DIR", "."), "publisher's data folder (KLATCH_FORGE_DIR)")
	c.PersistentFlags().StringVar(&o.cache, "cache", "", "folder for downloads, trees and images (KLATCH_CACHE; default /var/cache/klatch for root)")
	c.PersistentFlags().BoolVarP(&o.quiet, "quiet", "q", false, "no progress lines")
	c.AddCommand(initCommand(), kernelCommand(o), queueCommand(o), buildCommand(o), testCommand(o), importDeltaCommand(o),
		confirmCommand(o), reviewCommand(o), evidenceCommand(o), signCommand(o), publishCommand(o), recallCommand(o), keysCommand(o), logCommand(o), feedCommand(o), triageCommand(o), demoCommand(o), versionCommand())
	return c
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { out(cmd, "klatch-forge %s\n", version) }}
}

func envOr(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}
