// SPDX-License-Identifier: Apache-2.0

// Package seeded builds livepatches with a fault that was put in on purpose,
// and for each the good twin that differs in nothing else. A gate that lets a
// bad one through, or stops a good one, is no gate.
//
// The builder takes all of them: what it would refuse needs no lab. Start with
// All. The sources are in lab/livepatches/bad-*; one edits the kernel's own.
package seeded

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/build/source"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/kerneltest"
)

// Fix is what each of them claims to fix.
const Fix = cve.ID("CVE-2000-0001")

// The sequences that a seed and its predecessor are built as.
const (
	Earlier  livepatch.Sequence = 6
	Sequence livepatch.Sequence = 7
)

// Seed is one fault.
type Seed struct {
	// Name is that of the folder below lab/livepatches, without "bad-".
	Name string
	// Fault says what is wrong with the bad one.
	Fault string
	// check is a shell script; without it that of cmdlineCheck.
	check string
	// good are the replacements that make the good twin.
	good []change
	// position of the function that bad and good replace, of one name.
	position bool
	make     func(t testing.TB, k kerneltest.Kernel, good bool) build.Result
}

// change is one replacement of text in a file; a text that is not there ends
// the test.
type change struct{ file, from, to string }

// cmdlineCheck: each replaces what /proc/cmdline says, most of them.
const cmdlineCheck = "grep -q klatch /proc/cmdline"

// All lists them: one for each class that a gate must stop, and variants that
// another scenario has to stop.
func All() []Seed {
	return []Seed{
		{Name: "changes-nothing", Fault: "loads and changes nothing: its condition never holds", make: changesNothing},
		{Name: "wrong-function", Fault: "replaces the wrong one of two functions with one name", check: "grep -q klatch /sys/kernel/irq/9/type",
			position: true, good: []change{{queue.DeclaredName, "kernel/reboot.c", "kernel/irq/irqdesc.c"}}},
		{Name: "wrong-position", Fault: "is not what was built: the module has another position than the builder says", check: "grep -q klatch /sys/kernel/irq/9/type",
			make: wrongPosition},
		{Name: "sleeps-atomic", Fault: "sleeps with a spin lock held",
			good: []change{{"sleeps_atomic.c", "\tmsleep(2);\n", ""}}},
		{Name: "may-sleep", Fault: "takes a mutex with a spin lock held, which nobody else has just then",
			make: variant("sleeps-atomic", change{"sleeps_atomic.c", "\tmsleep(2);\n", "\tmutex_lock(&mutex);\n\tmutex_unlock(&mutex);\n"},
				change{"sleeps_atomic.c", "static DEFINE_SPINLOCK(lock);\n", "static DEFINE_SPINLOCK(lock);\nstatic DEFINE_MUTEX(mutex);\n"})},
		{Name: "leaks", Fault: "leaves memory behind at each call",
			good: []change{{"leaks.c", "/* kfree(line) is what it lacks. */", "kfree(line);"}}},
		{Name: "breaks-chain", Fault: "does not load over its predecessor",
			good: []change{{"breaks_chain.c", "klp_shadow_alloc(", "klp_shadow_get_or_alloc("}}},
		{Name: "second-call", Fault: "follows a null pointer at the second call",
			good: []change{{"second_call.c", "\tused = true;\n", ""}}},
		{Name: "never-finishes", Fault: "replaces a function that a kernel thread never leaves",
			good: []change{{"never_finishes.c", "\t{ .old_name = \"kcompactd\", .new_func = never_finishes_kcompactd },\n", ""},
				{"never_finishes.c", "static int never_finishes_kcompactd", "int never_finishes_kcompactd(void *p);\nint never_finishes_kcompactd"},
				{queue.DeclaredName, "\n[[function]]\nobject = \"vmlinux\"\nname = \"kcompactd\"\nfile = \"mm/compaction.c\"\n", ""}}},
		{Name: "module-unload", Fault: "breaks when a module that it reaches is unloaded",
			good: []change{{"module_unload.c", ".pre_patch = module_unload_pre_patch }", ".pre_patch = module_unload_pre_patch, .post_unpatch = module_unload_post_unpatch }"},
				{"module_unload.c", ", .callbacks = { .post_unpatch = module_unload_post_unpatch } },\n\t{ }", " },\n\t{ }"},
				{queue.DeclaredName, `when = ["pre_patch"]`, `when = ["pre_patch", "post_unpatch"]`},
				{queue.DeclaredName, "[[callback]]\nobject = \"loop\"\nwhen = [\"post_unpatch\"]\n\n", ""}}},
		{Name: "own-unload", Fault: "breaks when its own module is unloaded",
			good: []change{{"own_unload.c", "/* del_timer_sync(&timer) is what it lacks. */", "del_timer_sync(&timer);"}}},
	}
}

// Build gives the bad or the good one, as Sequence.
func (s Seed) Build(t testing.TB, k kerneltest.Kernel, good bool) build.Result {
	t.Helper()
	if s.make != nil {
		return s.make(t, k, good)
	}
	h := handwritten(t, "bad-"+s.Name, nil)
	if good {
		h = changed(t, h, s.good)
	}
	if s.position {
		h = placed(t, k, h)
	}
	return fromSource(t, k, h, Sequence)
}

// Check is the program that shows the flaw.
func (s Seed) Check(t testing.TB) []byte {
	t.Helper()
	if s.Name == "changes-nothing" {
		return program(t, "klatch/lab/checks/cve-2026-52928")
	}
	check := s.check
	if check == "" {
		check = cmdlineCheck
	}
	return []byte("#!/bin/sh\nif " + check + "; then exit 0; fi\nexit 1\n")
}

// Predecessor is a good livepatch of the sequence before: the fixture
// counts-reads.
func Predecessor(t testing.TB, k kerneltest.Kernel) build.Result {
	t.Helper()
	return fromSource(t, k, handwritten(t, "counts-reads", nil), Earlier)
}

// root is the repository's folder.
func root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "lab/livepatches")); err == nil {
			return dir
		}
	}
	t.Fatalf("no lab/livepatches above the working folder: %v", err)
	return ""
}

func program(t testing.TB, pkg string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", out, pkg)
	cmd.Dir, cmd.Env = root(t), append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, msg)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func handwritten(t testing.TB, folder string, changes []change) *queue.Handwritten {
	t.Helper()
	dir := filepath.Join(root(t), "lab/livepatches", folder)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	h := &queue.Handwritten{}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		h.Files = append(h.Files, queue.SourceFile{Name: f.Name(), Content: b})
	}
	return changed(t, h, changes)
}

// changed leaves the parsing to fromSource: a file may hold a word that is
// filled in later.
func changed(t testing.TB, h *queue.Handwritten, changes []change) *queue.Handwritten {
	t.Helper()
	out := &queue.Handwritten{Files: append([]queue.SourceFile(nil), h.Files...)}
	for _, c := range changes {
		done := false
		for i, f := range out.Files {
			if f.Name == c.file && strings.Contains(string(f.Content), c.from) {
				out.Files[i].Content = []byte(strings.ReplaceAll(string(f.Content), c.from, c.to))
				done = true
			}
		}
		if !done {
			t.Fatalf("%s has no %q", c.file, c.from)
		}
	}
	return out
}

// placed fills in the position, which the builder knows: it refuses a wrong
// one and names the right one.
func placed(t testing.TB, k kerneltest.Kernel, h *queue.Handwritten) *queue.Handwritten {
	t.Helper()
	fill := func(position string) *queue.Handwritten {
		out := &queue.Handwritten{}
		for _, f := range h.Files {
			// The comment that explains the word stays.
			text := regexp.MustCompile(`= POSITION\b`).ReplaceAllString(string(f.Content), "= "+position)
			out.Files = append(out.Files, queue.SourceFile{Name: f.Name, Content: []byte(text)})
		}
		return out
	}
	res := buildAny(t, k, fill("0"), Sequence)
	for _, r := range res.Refusals {
		if m := regexp.MustCompile(`is at position (\d+)`).FindStringSubmatch(r.Detail); m != nil {
			return fill(m[1])
		}
	}
	t.Fatalf("no position: result %s, refusals %+v", res.Result, res.Refusals)
	return nil
}

func fromSource(t testing.TB, k kerneltest.Kernel, h *queue.Handwritten, s livepatch.Sequence) build.Result {
	t.Helper()
	return built(t, buildAny(t, k, h, s))
}

func buildAny(t testing.TB, k kerneltest.Kernel, h *queue.Handwritten, s livepatch.Sequence) build.Result {
	t.Helper()
	h, err := queue.ParseHandwritten(h.Files)
	if err != nil {
		t.Fatal(err)
	}
	res, err := build.Run(t.Context(), &source.Driver{Cache: k.Cache}, compose.NewHandwritten(k.Entry, h, nil, source.Version(), s), t.TempDir(), build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func built(t testing.TB, res build.Result) build.Result {
	t.Helper()
	if res.Result != build.Built {
		t.Fatalf("result %s, error %q, refusals %+v", res.Result, res.Error, res.Refusals)
	}
	return res
}

// variant makes a bad one from the folder of another seed, whose own good twin
// is its twin too.
func variant(folder string, changes ...change) func(testing.TB, kerneltest.Kernel, bool) build.Result {
	return func(t testing.TB, k kerneltest.Kernel, good bool) build.Result {
		t.Helper()
		if !good {
			return fromSource(t, k, handwritten(t, "bad-"+folder, changes), Sequence)
		}
		for _, s := range All() {
			if s.Name == folder {
				return s.Build(t, k, true)
			}
		}
		t.Fatalf("no seed %q", folder)
		return build.Result{}
	}
}

// wrongPosition gives the result of the good twin of wrong-function with the
// module of the bad one: a builder that counts wrong.
func wrongPosition(t testing.TB, k kerneltest.Kernel, good bool) build.Result {
	t.Helper()
	var of Seed
	for _, s := range All() {
		if s.Name == "wrong-function" {
			of = s
		}
	}
	res := of.Build(t, k, true)
	if !good {
		res.Module = of.Build(t, k, false).Module
	}
	return res
}

// changesNothing edits the kernel's source: a fix whose condition never holds,
// and the fix.
func changesNothing(t testing.TB, k kerneltest.Kernel, good bool) build.Result {
	t.Helper()
	const file = "net/unix/af_unix.c"
	old, err := os.ReadFile(filepath.Join(k.Tree.Source(), file))
	if err != nil {
		t.Fatal(err)
	}
	condition := "sk->sk_type > SOCK_PACKET" // there is no such type
	if good {
		condition = "sk->sk_type != SOCK_STREAM"
	}
	anchor := "\tcase SIOCATMARK:\n"
	text := strings.Replace(string(old), anchor, anchor+"\t\tif ("+condition+")\n\t\t\treturn -EOPNOTSUPP;\n", 1)
	if text == string(old) {
		t.Fatalf("the change does not fit %s", file)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil { //nolint:forbidigo // thrown away after the test
		t.Fatal(err)
	}
	diff, err := queue.Change(t.Context(), k.Tree.Source(), dir, []string{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := compose.New(k.Entry, []queue.Patch{{Name: "seed", Fixes: []cve.ID{Fix}, Diff: diff, Files: []string{file}}}, k.Tools.Version(), Sequence)
	if err != nil {
		t.Fatal(err)
	}
	res, err := build.Run(t.Context(), &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}, p, t.TempDir(), build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	return built(t, res)
}
