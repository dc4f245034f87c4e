// SPDX-License-Identifier: Apache-2.0

package lab

import "context"

// Identity is a digest of everything of a rig that a result may depend on: its
// programs, and the guest's side of the line. It is empty for a rig that has
// no method Identity; none of its results is used a second time.
func Identity(ctx context.Context, r Rig) (string, error) {
	if d, ok := r.(interface {
		Identity(ctx context.Context) (string, error)
	}); ok {
		return d.Identity(ctx)
	}
	return "", nil
}
