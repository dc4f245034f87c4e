// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
)

// Queued writes the files that a queue touches, as it leaves them, into dir,
// which is empty and belongs to the build user.
func Queued(ctx context.Context, tree, dir string, patches []queue.Patch) error {
	for _, p := range patches {
		for _, f := range p.Files {
			to := filepath.Join(dir, f)
			if ok, err := exists(to); ok || err != nil {
				if err != nil {
					return err
				}
				continue
			}
			b, err := durable.ReadFile(filepath.Join(tree, f), maxSource)
			if err != nil {
				return fmt.Errorf("source patch %s: %w", p.Name, err)
			}
			if err := put(dir, f, b); err != nil {
				return err
			}
		}
		res, err := sandbox.Run(ctx, sandbox.Command{Dir: dir, Writable: []string{dir}, Stdin: bytes.NewReader(p.Diff),
			Argv: []string{"patch", "-p1", "--unified", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=-"}})
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			return fault.New(fault.Invalid, "patch_does_not_apply", "source patch %s of the queue does not fit this kernel: %s", p.Name, bytes.TrimSpace(res.Output)).
				WithHint("build what is in the queue first: klatch-forge build")
		}
	}
	return nil
}

// put writes a file and gives it and its folders to the build user.
func put(dir, file string, b []byte) error {
	at := dir
	for _, part := range splitPath(filepath.Dir(file)) {
		at = filepath.Join(at, part)
		if err := os.Mkdir(at, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
		if err := sandbox.Own(at); err != nil {
			return err
		}
	}
	to := filepath.Join(dir, file)
	if err := os.WriteFile(to, b, 0o644); err != nil { //nolint:forbidigo // scratch
		return err
	}
	return sandbox.Own(to)
}

func splitPath(dir string) []string {
	if dir == "." || dir == "" {
		return nil
	}
	parent, last := filepath.Split(dir)
	return append(splitPath(filepath.Clean(parent)), last)
}
