// SPDX-License-Identifier: Apache-2.0

package build

import (
	"context"
	"os"
	"path/filepath"

	"klatch/internal/kernel"
)

// Walk goes through the steps of a build until one fails, refuses, or finds
// that the kernel does not have the code; later ones do not run then.
func Walk(ctx context.Context, r *Result, steps []func(context.Context) error) error {
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
		if len(r.Refusals) > 0 {
			r.Result = Refused
			return nil
		}
		if r.Result == NotAffected {
			return nil
		}
	}
	r.Result = Built
	return nil
}

// Folder makes the folder of one build in the cache, which the build user may
// enter; see Scratch.
func Folder(cache string, release kernel.Release) (dir string, remove func(), err error) {
	builds := filepath.Join(cache, "builds")
	if err := os.MkdirAll(builds, 0o755); err != nil {
		return "", nil, err
	}
	if dir, remove, err = Scratch(builds, "run-"+string(release)+"-"); err != nil {
		return "", nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		remove()
		return "", nil, err
	}
	return dir, remove, nil
}
