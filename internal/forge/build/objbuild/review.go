// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"context"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/review"
)

// review adds warnings for what a person must look at.
func (j *job) review(_ context.Context) error {
	for _, f := range review.Look(j.tree.Source(), j.plan.Patches) {
		r := build.Refuse(f.Code, f.File)
		r.Function, r.Detail = f.Function, f.Detail
		j.warn(r)
	}
	return nil
}
