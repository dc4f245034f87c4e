// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestUIDOf(t *testing.T) {
	const passwd = "root:x:0:0::/root:/bin/sh\nklatchd:x:7:7:::\nklatch:x:998:997::/:/bin/false\nbad:x:y:1:::\n"
	for name, want := range map[string]uint32{"klatch": 998, "root": 0, "nobody": 0, "bad": 0} {
		if got := uidOf(name, passwd); got != want {
			t.Errorf("uid of %s is %d, want %d", name, got, want)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"force"}, {"serve", "now"}} {
		var out, errs strings.Builder
		if got := run(args, &out, &errs); got != 2 || !strings.HasPrefix(errs.String(), "usage:") {
			t.Errorf("%q ends with %d and %q", args, got, errs.String())
		}
	}
	var out, errs strings.Builder
	if got := run([]string{"version"}, &out, &errs); got != 0 || out.String() != "klatch-loader unknown\n" {
		t.Errorf("version ends with %d, %q and %q", got, out.String(), errs.String())
	}
}
