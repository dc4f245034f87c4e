// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	"klatch/internal/forge/lab"
)

// Identity implements lab.Identity. Which accelerator is used does not change
// what a livepatch does, and is not part of it.
func (r *Rig) Identity(ctx context.Context) (string, error) {
	host, err := r.host(ctx)
	if err != nil {
		return "", lab.Brokenf(err, "describe the rig")
	}
	h := sha256.New()
	fmt.Fprintf(h, "qemu 1\n%s\n", host.Emulator) //nolint:errcheck // a hash takes everything
	for _, program := range []string{r.cfg.Guest, r.cfg.Busybox} {
		if err := addFile(h, program); err != nil {
			return "", lab.Brokenf(err, "describe the rig")
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func addFile(h io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	_, err = fmt.Fprintf(h, "%x\n", sum.Sum(nil))
	return err
}
