// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"context"
	"slices"
	"strings"
)

// Names lists the packages whose name begins so, sorted.
func (a *Archive) Names(ctx context.Context, prefix string) ([]string, error) {
	out, err := a.apt(ctx, a.dir, "apt-cache", "pkgnames", prefix)
	if err != nil {
		return nil, err
	}
	names := strings.Fields(string(out))
	slices.Sort(names)
	return names, nil
}
