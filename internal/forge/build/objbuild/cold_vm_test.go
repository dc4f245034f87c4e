// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/testkit/kerneltest"
)

// TestColdPartComesAlong: the compiler puts the warning of cp_old_stat into
// cp_old_stat.cold, which jumps back. A change behind the place where it jumps
// to leaves the cold part as it is; the livepatch must have it all the same,
// or that path would go on in the old function.
func TestColdPartComesAlong(t *testing.T) {
	k := kerneltest.Prepared(t)
	res, _ := run(t, k, k.Cache, edit(t, k, "fs/stat.c", sub("tmp.st_ino != stat->ino)\n		return -EOVERFLOW;", "tmp.st_ino != stat->ino)\n		return -EINVAL;",
		"	if (tmp.st_nlink != stat->nlink)\n		return -EOVERFLOW;", "	if (tmp.st_nlink != stat->nlink)\n		return -EINVAL;")))
	if res.Result != build.Built {
		t.Fatalf("result %s: %+v", res.Result, res.Refusals)
	}
	m := readModule(t, res.Module.Path)
	is := func(s string) bool { return strings.HasPrefix(s, "cp_old_stat.cold") }
	if !slices.Contains(m.refs["cp_old_stat"], "cp_old_stat.cold") && !slices.ContainsFunc(m.defined, is) {
		t.Fatalf("cp_old_stat has no cold part here; find another function: %q", m.refs["cp_old_stat"])
	}
	if !slices.ContainsFunc(m.defined, is) {
		t.Errorf("the livepatch jumps into the kernel's own cold part: %q", m.refs["cp_old_stat"])
	}
	if !slices.Contains(m.refs["cp_old_stat.cold"], "cp_old_stat") {
		t.Errorf("the cold part refers to %q", m.refs["cp_old_stat.cold"])
	}
	if !slices.Equal(m.replaced, []string{"cp_old_stat"}) {
		t.Errorf("replaced %q", m.replaced)
	}
}
