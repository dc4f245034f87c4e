// SPDX-License-Identifier: Apache-2.0

//go:build vm

package klpbuild_test

import (
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/buildtest"
	"klatch/internal/forge/build/klpbuild"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

func TestConformance(t *testing.T) {
	k := kerneltest.Own(t)
	const unbuilt = "net/sctp/socket.c"
	one := func(file string, change func(string) string) queue.Patch {
		return edit(t, k, "CVE-2000-0001", file, nil, change)
	}
	cache := elsewhere(t, k, nil)
	buildtest.Run(t, buildtest.Subject{
		Builder:   &klpbuild.Driver{Cache: cache},
		Elsewhere: func(t *testing.T) build.Builder { return &klpbuild.Driver{Cache: elsewhere(t, k, nil)} },
		Hasty:     &klpbuild.Driver{Cache: cache, Timeout: time.Millisecond},
		Good:      plan(t, k, fixes(t, k)...),
		Functions: replacedByFixes,
		Other:     plan(t, k, one(cmdline, afterNewline)),
		Unbuilt:   plan(t, k, one(unbuilt, func(s string) string { return s + "/* more */\n" })),
		Refused: []buildtest.Refused{
			{Name: "source that does not compile", Code: "does_not_compile",
				Plan: plan(t, k, one(cmdline, func(s string) string { return s + "int x = y;\n" }))},
		},
		Scratch: filepath.Join(cache, "builds"),
		Tree:    kerneltree.At(cache, k.Entry).Source(),
		Watched: []string{cmdline, dummy, unbuilt, "scripts/livepatch/init.c", ".config", "Module.symvers"},
	})
}
