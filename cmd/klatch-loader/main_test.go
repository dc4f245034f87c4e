// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
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

// TestUnits keeps the sandbox of the two units the same, and without the
// settings that take away what the loader is for.
func TestUnits(t *testing.T) {
	var sandbox []string
	for _, name := range []string{"klatch-loader.service", "klatch-loader-boot.service"} {
		b, err := os.ReadFile("../../dist/systemd/" + name)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(b), "# -- sandbox\n")
		box, _, closed := strings.Cut(rest, "# -- end of the sandbox\n")
		if !ok || !closed {
			t.Fatalf("%s has no marked sandbox", name)
		}
		sandbox = append(sandbox, box)
	}
	if sandbox[0] != sandbox[1] {
		t.Error("the sandboxes of the two units differ")
	}
	for _, word := range []string{"\nProtectKernelModules=", "\nProtectKernelTunables=", "CAP_SYS_ADMIN\n", "\nExecStart"} {
		if strings.Contains(sandbox[0], word) {
			t.Errorf("the sandbox holds %q", word)
		}
	}
	for _, word := range []string{"PrivateNetwork=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "RestrictAddressFamilies=AF_UNIX\n"} {
		if !strings.Contains(sandbox[0], word) {
			t.Errorf("the sandbox lacks %q", word)
		}
	}
}
