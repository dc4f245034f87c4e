// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

func recallCommand(o *options) *cobra.Command {
	var f recallFlags
	c := &cobra.Command{
		Use:   "recall --kernel RELEASE --sequence N --reason TEXT",
		Short: "Take a livepatch back: nobody is offered it or loads it any more",
		Long: `Adds to the publisher's recalls (recalls.json in the data folder), signs them
and publishes them. At its next check each machine learns of it: what was
recalled is neither offered nor loaded, at boot either. A machine that runs it
keeps running it until its next boot or a higher sequence: build that one.

--floor says the least sequence that may be loaded on a kernel. --revoke-key
takes back a manifest key ("manifest-1") or the module key ("module"; where the
anchor has two, the name of one): what is signed by it counts no more, where the
other keys still reach the threshold. Recalls only grow. Without flags, or with
--list, says what is recalled; after a crash, --resume completes what was begun.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cli.Cannot(recall(cmd, o, f), "recall")
		},
	}
	optionalKernelFlag(c, &f.kernel)
	c.Flags().Uint32Var(&f.sequence, "sequence", 0, "sequence to take back")
	c.Flags().Uint32Var(&f.floor, "floor", 0, "least sequence that may be loaded")
	c.Flags().StringVar(&f.reason, "reason", "", "why, for the people who read about it on their machines")
	c.Flags().StringVar(&f.key, "revoke-key", "", "a manifest key's name, module, or the name of a module key")
	c.Flags().BoolVar(&f.resume, "resume", false, "publish what recalls.json says")
	c.Flags().BoolVar(&f.list, "list", false, "say what is recalled")
	return c
}

type recallFlags struct {
	kernel, reason, key string
	sequence, floor     uint32
	resume, list        bool
}

func recall(cmd *cobra.Command, o *options, f recallFlags) error {
	d, err := o.data()
	if err != nil {
		return err
	}
	if f.list || f.sequence == 0 && f.floor == 0 && f.key == "" && !f.resume {
		r, err := publish.Recalls(d)
		printRecalls(cmd, r)
		return err
	}
	if f.sequence != 0 && f.reason == "" {
		return invalid("a recall has no reason")("say why: --reason TEXT")
	}
	var id kernel.BuildID
	if f.sequence != 0 || f.floor != 0 {
		if id, err = buildID(d, f.kernel, f.sequence); err != nil {
			return err
		}
	}
	digest := ""
	if f.key != "" {
		if digest, err = sign.KeyDigest(d, f.key); err != nil {
			return err
		}
	}
	r, res, err := publish.Recall(cmd.Context(), d, func(r *livepatch.Recalls) {
		if f.sequence != 0 && r.Check(id, livepatch.Sequence(f.sequence)) == nil {
			r.Entries = append(r.Entries, livepatch.Recall{Kernel: id, Sequence: livepatch.Sequence(f.sequence), Reason: f.reason})
		}
		if f.floor != 0 && r.Check(id, livepatch.Sequence(f.floor-1)) == nil {
			r.Floors = append(r.Floors, livepatch.Floor{Kernel: id, Sequence: livepatch.Sequence(f.floor)})
		}
		if digest != "" && !r.RevokesDigest(digest) {
			r.Keys = append(r.Keys, digest)
		}
	}, time.Now())
	if res.Draft != nil {
		return keepDraft(cmd, o, res.Draft)
	}
	if err != nil {
		return err
	}
	printRecalls(cmd, r)
	out(cmd, "published     targets %d, timestamp %d\n", res.Targets, res.Timestamp)
	return nil
}

func printRecalls(cmd *cobra.Command, r livepatch.Recalls) {
	out(cmd, "recalls       version %d\n", r.Version)
	for _, e := range r.Entries {
		out(cmd, "  recalled    sequence %d of %s: %s\n", e.Sequence, e.Kernel, e.Reason)
	}
	for _, e := range r.Floors {
		out(cmd, "  floor       %s: sequence %d\n", e.Kernel, e.Sequence)
	}
	for _, k := range r.Keys {
		out(cmd, "  revoked key %s\n", k)
	}
}

// buildID finds the kernel build that a release means, by its builds.
func buildID(d datadir.Dir, release string, sequence uint32) (kernel.BuildID, error) {
	all, err := build.Read(d.Path, kernel.Release(release))
	if err != nil {
		return kernel.BuildID{}, err
	}
	for _, b := range all {
		if sequence == 0 || b.Sequence == livepatch.Sequence(sequence) {
			return b.BuildID, nil
		}
	}
	return kernel.BuildID{}, invalid("no livepatch of kernel %q has sequence %s", release, fmt.Sprint(sequence))("klatch-forge kernel list; the builds are in out/")
}
