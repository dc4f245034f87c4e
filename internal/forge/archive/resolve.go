// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// installLine is what apt says of a package that it would install:
// "Inst gcc-14 (14.2.0-19 Debian:13.1/stable [amd64])".
var installLine = regexp.MustCompile(`(?m)^Inst (\S+) \((\S+) `)

// Closure asks apt what an empty system needs for these packages (names, or
// patterns of apt-patterns(7)), without recommended ones: each package with
// version and digest, from the signed lists, by name.
func (a *Archive) Closure(ctx context.Context, names ...string) ([]Package, error) {
	// Our state has no installed packages, so that apt starts from nothing.
	out, err := a.apt(ctx, a.dir, append([]string{"apt-get", "--simulate", "-q", "--no-install-recommends", "install"}, names...)...)
	if err != nil {
		return nil, err
	}
	argv := []string{"apt-cache", "show"}
	want := map[string]bool{}
	for _, m := range installLine.FindAllStringSubmatch(string(out), -1) {
		argv = append(argv, m[1]+"="+m[2])
		want[m[1]+"="+m[2]] = true
	}
	if len(want) == 0 {
		return nil, fault.New(fault.NotFound, "no_package", "apt would install nothing for %s", strings.Join(names, " "))
	}
	if out, err = a.apt(ctx, a.dir, argv...); err != nil {
		return nil, err
	}
	shown, err := parseStanzas(out)
	if err != nil {
		return nil, err
	}
	var all []Package
	for _, p := range shown {
		if k := p.Name + "=" + p.Version; want[k] { // several suites may have it
			delete(want, k)
			all = append(all, p)
		}
	}
	for k := range want {
		return nil, fmt.Errorf("apt would install %s, which its lists do not have", k)
	}
	slices.SortFunc(all, func(p, q Package) int { return strings.Compare(p.Name, q.Name) })
	return all, nil
}
