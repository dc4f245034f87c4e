// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

const namespaceC = "kernel/time/namespace.c"

// timensFunctions are functions of namespaceC that no compiler can do without:
// global, or in a table.
var timensFunctions = []string{"do_timens_ktime_to_host", "copy_time_ns", "free_time_ns", "timens_get", "timens_for_children_get", "timens_put",
	"timens_commit", "timens_install", "timens_on_fork", "timens_owner", "proc_timens_show_offsets", "proc_timens_set_offset"}

// wrong is a way in which a build environment can be wrong.
type wrong struct {
	name, needs string
	flags, cc   string
	config      [2]string // line of the .config, and what it becomes
	long        bool      // one of many of its kind, tried where time does not matter
	same        bool      // it must not matter: flags that the kernel has anyway
}

var wrongs = []wrong{
	{name: "nothing", same: true},
	{name: "-O1", long: true, flags: "-O1"},
	{name: "no inlining of small functions", flags: "-fno-inline-small-functions"},
	{name: "no sibling calls", long: true, flags: "-fno-optimize-sibling-calls"},
	{name: "stack protector for all", flags: "-fstack-protector-all"},
	{name: "frame pointers", long: true, flags: "-fno-omit-frame-pointer"},
	{name: "overflow as the kernel has it", long: true, flags: "-fno-strict-overflow", same: true},
	{name: "a macro that nobody reads", flags: "-DKLATCH_NOBODY", same: true},
	{name: "no strong stack protector", config: [2]string{"CONFIG_STACKPROTECTOR_STRONG=y", "# CONFIG_STACKPROTECTOR_STRONG is not set"}},
	{name: "no retpolines", long: true, config: [2]string{"CONFIG_RETPOLINE=y", "# CONFIG_RETPOLINE is not set"}},
	{name: "another tick", config: [2]string{"CONFIG_HZ_250=y", "CONFIG_HZ_1000=y"}},
	{name: "unchecked lists", long: true, config: [2]string{"CONFIG_DEBUG_LIST=y", "# CONFIG_DEBUG_LIST is not set"}},
	{name: "gcc 11", cc: "gcc-11", needs: "gcc-11"},
	{name: "clang 14", long: true, cc: "clang-14", needs: "clang"},
}

// TestAWrongEnvironmentIsRefusedWhereTheCodeDiffers: what differs is found out
// here, without package match, by compiling the unpatched file in the right
// and in the wrong environment. The driver must refuse exactly those functions,
// and no environment that makes the same code.
func TestAWrongEnvironmentIsRefusedWhereTheCodeDiffers(t *testing.T) {
	k := kerneltest.Prepared(t)
	p := edit(t, k, namespaceC, func(s string) string {
		for _, f := range timensFunctions {
			s = nopAtDefinition(t, s, f)
		}
		return s
	})
	right := functionsOf(t, compileAlone(t, k, k.Cache, ""))
	caught, refused, same := 0, 0, 0
	for _, w := range wrongs {
		t.Run(w.name, func(t *testing.T) {
			if w.long {
				testkit.Need(t, "long")
			}
			if w.needs != "" {
				testkit.Need(t, w.needs)
			}
			k := k
			k.Entry.ExtraCFlags = w.flags
			if w.cc != "" {
				k.Entry.CC = w.cc
			}
			cache := kerneltest.OtherCache(t, k, func(tree string) {
				if w.config[0] != "" {
					changeConfig(t, filepath.Join(tree, ".config"), w.config[0], w.config[1])
				}
			})
			object := compileAlone(t, k, cache, w.flags)
			res := checkEnvironment(t, k, cache, p)
			if object == nil { // this compiler cannot build it at all
				if res.Result != build.Broken {
					t.Errorf("the file does not compile here, but the result is %s: %+v", res.Result, res.Refusals)
				}
				return
			}
			var want, got []string
			have := functionsOf(t, object)
			for _, f := range timensFunctions {
				if right[f] != have[f] {
					want = append(want, f)
				}
			}
			for _, r := range res.Refusals {
				if slices.Contains(timensFunctions, r.Function) && (r.Code == "wrong_environment" || r.Code == "match_failed") {
					got = append(got, r.Function)
				}
			}
			slices.Sort(want)
			slices.Sort(got)
			t.Logf("%d of %d functions differ; %s, %d refused", len(want), len(timensFunctions), res.Result, len(got))
			if w.same && len(want) > 0 {
				t.Errorf("this environment should make the same code; it differs in %v", want)
			}
			switch {
			case len(want) == 0 && res.Result != build.Built:
				t.Errorf("the code is the same, but %s: %s %+v", res.Result, res.Error, res.Refusals)
			case len(want) > 0 && res.Result != build.Refused:
				t.Errorf("%v differ, but %s: %s", want, res.Result, res.Error)
			case len(got) > 0 && !slices.Equal(want, got):
				t.Errorf("differ %v\nrefused %v", want, got)
			}
			if len(want) == 0 {
				same++
			} else {
				caught++
			}
			refused += len(got)
		})
	}
	t.Logf("%d environments make other code and were refused, %d functions by name; %d make the same code and were not", caught, refused, same)
	if caught < 4 || same < 2 {
		t.Errorf("too few environments: %d with other code, %d with the same", caught, same)
	}
}

func changeConfig(t *testing.T, name, from, to string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(b, []byte("\n"+from+"\n"), []byte("\n"+to+"\n"), 1)
	if bytes.Equal(b, changed) {
		t.Fatalf("the config has no line %q", from)
	}
	if err := os.WriteFile(name, changed, 0o644); err != nil {
		t.Fatal(err)
	}
}

// nopAtDefinition adds an instruction to a function, wherever its type begins.
func nopAtDefinition(t testing.TB, s, function string) string {
	t.Helper()
	for from := 0; ; {
		i := strings.Index(s[from:], function+"(")
		if i < 0 {
			t.Fatalf("no definition of %s", function)
		}
		head, _, found := strings.Cut(s[from+i:], "\n{\n")
		if found && !strings.ContainsAny(head, ";{") {
			j := from + i + len(head) + len("\n{\n")
			return s[:j] + "\tasm volatile(\"nop\");\n" + s[j:]
		}
		from += i + 1
	}
}

func checkEnvironment(t *testing.T, k kerneltest.Kernel, cache string, patches ...queue.Patch) build.Result {
	t.Helper()
	plan, err := compose.New(k.Entry, patches, k.Tools.Version(), 1)
	if err != nil {
		t.Fatal(err)
	}
	d := &objbuild.Driver{Cache: cache, Tools: k.Tools}
	res, err := d.Check(context.WithoutCancel(t.Context()), plan, build.NewClock(nil))
	if err != nil {
		res.Result, res.Error = build.Broken, err.Error()
	}
	return res
}

// compileAlone compiles namespaceC unpatched; nil where it does not compile.
func compileAlone(t testing.TB, k kerneltest.Kernel, cache, flags string) []byte {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "klatch-alone-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	target := strings.TrimSuffix(namespaceC, ".c") + ".o"
	tree := kerneltree.At(cache, k.Entry).Source()
	c := sandbox.Command{Tree: tree, Dir: tree, Scratch: filepath.Join(dir, "scratch"),
		Argv: kerneltree.Make(k.Entry, "KCFLAGS=-g0 -ffunction-sections "+flags, target)}
	res, err := sandbox.Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(c.Upper(target))
	if err != nil {
		t.Logf("does not compile: %s", res.Output)
		return nil
	}
	return b
}

// functionsOf describes the code of each function: its bytes with those that
// relocations fill in left out, and what the relocations name.
func functionsOf(t *testing.T, object []byte) map[string]string {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) != elf.STT_FUNC || int(s.Section) >= len(f.Sections) {
			continue
		}
		text, err := f.Sections[s.Section].Data()
		if err != nil || s.Value+s.Size > uint64(len(text)) {
			t.Fatalf("%s: %v", s.Name, err)
		}
		code := slices.Clone(text[s.Value : s.Value+s.Size])
		var names []string
		if rela := f.Section(".rela" + f.Sections[s.Section].Name); rela != nil {
			data, err := rela.Data()
			if err != nil {
				t.Fatal(err)
			}
			for ; len(data) >= 24; data = data[24:] {
				off, info := binary.LittleEndian.Uint64(data), binary.LittleEndian.Uint64(data[8:])
				if off < s.Value || off >= s.Value+s.Size {
					continue
				}
				width := 4
				if elf.R_X86_64(uint32(info)) == elf.R_X86_64_64 {
					width = 8
				}
				copy(code[off-s.Value:], make([]byte, width))
				to := symbols[info>>32-1]
				name := to.Name
				if elf.ST_TYPE(to.Info) == elf.STT_SECTION || strings.HasPrefix(name, ".") {
					name = "a section"
				}
				names = append(names, fmt.Sprintf("%d %s", off-s.Value, name))
			}
		}
		slices.Sort(names)
		out[s.Name] = fmt.Sprintf("%x %v", code, names)
	}
	return out
}
