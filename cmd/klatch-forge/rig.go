// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"klatch/internal/forge/datadir"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/board"
	"klatch/internal/forge/lab/qemu"
)

// rigFlags say on what machines a livepatch is tried.
type rigFlags struct{ rig, board string }

// The drivers of lab.Rig, as --rig names them.
const (
	rigQEMU  = "qemu"
	rigBoard = "board"
)

func (f *rigFlags) flags(c *cobra.Command) {
	c.Flags().StringVar(&f.rig, "rig", "", "qemu: virtual machines; board: real hardware (default qemu, or board with --board)")
	c.Flags().StringVar(&f.board, "board", "", "board's file, or the name of one in boards/ of the data folder (docs/howto/board.md)")
	_ = c.RegisterFlagCompletionFunc("rig", cobra.FixedCompletions([]string{rigQEMU, rigBoard}, cobra.ShellCompDirectiveNoFileComp))
}

// open makes the rig. Without a name the board is the only one of the data
// folder.
func (f rigFlags) open(d datadir.Dir, cache string) (lab.Rig, error) {
	name := f.rig
	if name == "" {
		name = rigQEMU
		if f.board != "" {
			name = rigBoard
		}
	}
	switch {
	case name == rigQEMU && f.board == "":
		return newRig(cache)
	case name == rigQEMU:
		return nil, invalid("--board %s is for real hardware", f.board)("leave out --rig, or say --rig board")
	case name != rigBoard:
		return nil, invalid("rig %q is unknown", name)("use --rig qemu or --rig board")
	}
	path, err := f.boardFile(filepath.Join(d.Path, "boards"))
	if err != nil {
		return nil, err
	}
	file, err := board.Load(path)
	if err != nil {
		return nil, err
	}
	return board.New(board.Config{File: file})
}

func (f rigFlags) boardFile(dir string) (string, error) {
	all, _ := filepath.Glob(filepath.Join(dir, "*.toml")) // the pattern is well-formed
	switch {
	case f.board == "" && len(all) == 1:
		return all[0], nil
	case f.board == "" && len(all) == 0:
		return "", invalid("no board is described in %s", dir)("write a file as in docs/howto/board.md, or name one: --board FILE")
	case f.board == "":
		return "", invalid("there are %d boards in %s", len(all), dir)("choose one: --board NAME")
	}
	if named := filepath.Join(dir, f.board+".toml"); !strings.Contains(f.board, "/") && slices.Contains(all, named) {
		return named, nil
	}
	return f.board, nil
}

// newRig makes virtual machines whose guest side is this program itself.
func newRig(cache string) (*qemu.Rig, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return qemu.New(qemu.Config{Guest: self, Cache: filepath.Join(cache, "lab")})
}
