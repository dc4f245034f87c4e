// SPDX-License-Identifier: Apache-2.0

//go:build vm

package lab_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/source"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/guest"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// bootsEnv says which boots TestCleanBootsAreNoTrouble makes, as "FROM-TO",
// the last one not included. Whoever sets it gets every prepared kernel; CI
// makes the first four boots of one.
const bootsEnv = "KLATCH_BOOTS"

// Machines differ, so that what only shows on some of them is met.
var (
	bootCPUs   = []int{2, 1, 4}
	bootMemory = []int{512, 256, 1024, 384, 768}
)

// What a healthy machine does with a livepatch; each ends with the kernel as
// it was. The file /lab/wait has the functions.
var bootStories = []struct{ name, script string }{
	{"load and disable", `load 7; grep -q klatch /proc/cmdline; disable 7`},
	{"replace", `load 7; load 8; rmmod klatch_7; grep -q other /proc/cmdline; disable 8`},
	{"cancel", `insmod /lab/klatch_7.ko; disable 7; load 7; disable 7`},
	{"at work", `/proc/1/exe ` + guest.LoadArg + ` 6s >/dev/null & sleep 1; load 7; load 8; rmmod klatch_7; disable 8; wait $!`},
	{"modules", `insmod /lab/loop.ko; load 7; rmmod loop; insmod /lab/loop.ko; disable 7; rmmod loop`},
	{"twice", `load 7; ! insmod /lab/klatch_7.ko 2>/dev/null; disable 7`},
}

const bootFunctions = `
load() { insmod /lab/klatch_$1.ko; while [ "$(cat /sys/kernel/livepatch/klatch_$1/transition)" = 1 ]; do usleep 100000; done; }
disable() { echo 0 > /sys/kernel/livepatch/klatch_$1/enabled; while [ -d /sys/kernel/livepatch/klatch_$1 ]; do usleep 100000; done; rmmod klatch_$1; }
`

// bootable is a kernel with two livepatches for it.
type bootable struct {
	tree  kerneltree.Tree
	files []lab.File
}

// TestCleanBootsAreNoTrouble boots real kernels, loads livepatches in every
// way that is no fault, and wants the detector to find nothing.
func TestCleanBootsAreNoTrouble(t *testing.T) {
	testkit.Need(t, "qemu")
	from, to := 0, 4
	all := os.Getenv(bootsEnv)
	if all != "" {
		if _, err := fmt.Sscanf(all, "%d-%d", &from, &to); err != nil || from < 0 || to <= from {
			t.Fatalf("%s=%q: want FROM-TO", bootsEnv, all)
		}
	}
	k := kerneltest.Prepared(t)
	kernels := []bootable{{k.Tree, twoLivepatches(t, k.Cache, k.Entry)}}
	if all != "" {
		for _, more := range prepared(t, k) {
			kernels = append(kernels, bootable{kerneltree.At(k.Cache, more), twoLivepatches(t, k.Cache, more)})
		}
	}
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	for n := from; n < to; n++ {
		b, q := kernels[n%len(kernels)], n/len(kernels)
		story := bootStories[q%len(bootStories)]
		spec := lab.Spec{Name: "clean", Kernel: b.tree.Image(), Files: b.files,
			CPUs: bootCPUs[(q+q/len(bootStories))%len(bootCPUs)], MemoryMiB: bootMemory[q%len(bootMemory)]}
		t.Run(fmt.Sprintf("%d", n), func(t *testing.T) {
			began := time.Now()
			for try := 1; cleanBoot(t, rig, spec, story.script, n%10 == 9) == lab.Broken; try++ {
				if try == 3 {
					t.Fatal("the lab was broken three times")
				}
			}
			t.Logf("kernel %s, %d CPUs, %d MiB, %s: %.1f s", filepath.Base(b.tree.Dir), spec.CPUs, spec.MemoryMiB, story.name, time.Since(began).Seconds())
		})
	}
}

// cleanBoot fails the test for trouble, and for a story that does not end well.
// Where the detector knows that the emulator stumbled it says broken.
func cleanBoot(t *testing.T, rig lab.Rig, spec lab.Spec, script string, twice bool) lab.Verdict {
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	m, err := rig.Boot(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var failed []string
	tell := func() {
		res, err := m.Run(ctx, lab.Command{Argv: []string{"sh", "-ec", bootFunctions + script}, Timeout: 3 * time.Minute})
		if err != nil || res.Exit != 0 {
			failed = append(failed, fmt.Sprintf("the story: exit status %d, %v: %s", res.Exit, err, res.Stderr))
		}
	}
	tell()
	if twice && failed == nil {
		if err := m.Reboot(ctx); err != nil {
			t.Fatal(err)
		}
		tell()
	}
	text, err := m.Console()
	if err != nil {
		t.Error(err)
	}
	verdict, troubles := lab.Judge(nil, text)
	if verdict == lab.Broken {
		t.Logf("the emulator stumbled: %s\n%s", troubles[0].Title, troubles[0].Report)
	} else {
		for _, f := range failed {
			t.Error(f)
		}
		if !strings.Contains(text, "patching complete") {
			t.Error("no livepatch was loaded")
		}
		for _, tr := range troubles {
			t.Errorf("false alarm, line %d: %s: %s\n%s", tr.Line, tr.Kind, tr.Title, tr.Report)
		}
	}
	if *update && verdict != lab.Pass {
		if err := os.WriteFile(filepath.Join(os.TempDir(), "klatch-console-"+filepath.Base(t.Name())+".log"), []byte(text), 0o644); err != nil {
			t.Error(err)
		}
	}
	return verdict
}

// prepared lists the other kernels of Debian in the cache.
func prepared(t *testing.T, k kerneltest.Kernel) []catalog.Entry {
	t.Helper()
	e, err := k.Maker.Add(t.Context(), kernel.Release("6.1.0-54-cloud-amd64"), "")
	if err != nil {
		t.Fatal(err)
	}
	return []catalog.Entry{e, kerneltest.Debian13(t).Entry}
}

// twoLivepatches builds the sequences 7 and 8, which say different things, and
// takes a module of the kernel along.
func twoLivepatches(t *testing.T, cache string, e catalog.Entry) []lab.File {
	t.Helper()
	h, err := queue.ReadHandwritten("../../../lab/livepatches/counts-reads")
	if err != nil {
		t.Fatal(err)
	}
	files := []lab.File{{Name: "loop.ko", Source: kerneltree.At(cache, e).ModuleFile("loop")}}
	for _, s := range []livepatch.Sequence{7, 8} {
		if s == 8 {
			for i, f := range h.Files {
				h.Files[i].Content = []byte(strings.ReplaceAll(string(f.Content), "klatch counts_reads", "klatch other"))
			}
			if h, err = queue.ParseHandwritten(h.Files); err != nil {
				t.Fatal(err)
			}
		}
		res, err := build.Run(t.Context(), &source.Driver{Cache: cache}, compose.NewHandwritten(e, h, nil, source.Version(), s), t.TempDir(), build.NewClock(nil))
		if err != nil || res.Result != build.Built {
			t.Fatalf("%v: %s %s %+v", err, res.Result, res.Error, res.Refusals)
		}
		files = append(files, lab.File{Name: s.ModuleName() + ".ko", Source: res.Module.Path})
	}
	return files
}
