// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// environment looks for what differs from the distribution's build. It is no
// proof and refuses nothing; it gives a failed match its name.
func (j *job) environment(ctx context.Context, _ []object) error {
	e := j.plan.Kernel
	m := &j.result.Match
	res, err := j.run(ctx, sandbox.Command{Argv: []string{e.CC, "--version"}})
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("exit status %d: %s", res.Exit, shorten(res.Output))
	}
	if err != nil {
		return fault.New(fault.Internal, "no_compiler", "compiler %s of kernel %s: %w", e.CC, e.Release, err).
			WithHint("apt-get install %s", e.CC)
	}
	// "gcc-12 (Debian 12.2.0-14) 12.2.0"; the first word is how it was called.
	have, _, _ := strings.Cut(string(res.Output), "\n")
	j.compiler = have
	if cutFirst(have) != cutFirst(e.Compiler) {
		m.Environment = append(m.Environment, match.Setting{Aspect: "compiler", Want: e.Compiler, Have: have})
	}
	if e.SourceV != e.Version {
		m.Environment = append(m.Environment, match.Setting{Aspect: "source", Want: e.Version, Have: e.SourceV})
	}
	if e.ExtraCFlags != "" {
		m.Environment = append(m.Environment, match.Setting{Aspect: "flags", Want: "none of our own", Have: e.ExtraCFlags})
	}
	diff, err := configDiff(j.tree.Config(), filepath.Join(j.tree.Source(), ".config"))
	if err != nil {
		return err
	}
	for _, d := range diff {
		m.Environment = append(m.Environment, match.Setting{Aspect: "config", Want: d[0], Have: d[1]})
	}
	return nil
}

func cutFirst(s string) string {
	_, rest, _ := strings.Cut(s, " ")
	return rest
}

// maxConfigDiffs limits how many options are named: one is enough to be wrong.
const maxConfigDiffs = 20

// irrelevantOptions differ between the image's config and any rebuild, and
// reach no object code: where keys lie, and what the headers package resets.
var irrelevantOptions = []string{"CONFIG_MODULE_SIG_KEY", "CONFIG_MODULE_SIG_ALL", "CONFIG_SYSTEM_TRUSTED_KEYS", "CONFIG_BUILD_SALT"}

func configDiff(wantFile, haveFile string) ([][2]string, error) {
	want, err := readConfig(wantFile)
	if err != nil {
		return nil, err
	}
	have, err := readConfig(haveFile)
	if err != nil {
		return nil, err
	}
	var out [][2]string
	for _, name := range sortedKeys(want, have) {
		if want[name] == have[name] || slices.Contains(irrelevantOptions, name) || len(out) == maxConfigDiffs {
			continue
		}
		out = append(out, [2]string{describeOption(name, want[name]), describeOption(name, have[name])})
	}
	return out, nil
}

func describeOption(name, value string) string {
	if value == "" {
		return name + " unset"
	}
	return name + "=" + value
}

func readConfig(path string) (map[string]string, error) {
	b, err := durable.ReadFile(path, 4<<20)
	if err != nil {
		return nil, err
	}
	options := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			options[name] = value
		}
	}
	return options, nil
}

func sortedKeys(a, b map[string]string) []string {
	var keys []string
	for k := range a {
		keys = append(keys, k)
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// Tools are the programs of Debian's kpatch-build package, unpacked into the
// cache; nothing is installed.
type Tools struct {
	Dir     string // holds usr/lib/kpatch and usr/share/kpatch
	Package archive.Package
}

func (t Tools) program(name string) string { return filepath.Join(t.Dir, "usr/lib/kpatch", name) }

func (t Tools) template(name string) string {
	return filepath.Join(t.Dir, "usr/share/kpatch/patch", name)
}

// Version names the tools in a plan.
func (t Tools) Version() map[string]string {
	return map[string]string{t.Package.Name: t.Package.Version + " " + t.Package.SHA256, "objbuild": "1"}
}

// FetchTools makes the tools ready in the cache.
func FetchTools(ctx context.Context, a *archive.Archive, cache string, progress archive.Progress) (Tools, error) {
	p, err := a.Find(ctx, "kpatch-build", "")
	if err != nil {
		return Tools{}, err
	}
	t := Tools{Dir: filepath.Join(cache, "tools", "kpatch-build-"+p.Version), Package: p}
	if _, err := os.Stat(t.Dir); err == nil {
		return t, nil
	}
	if err := a.Download(ctx, []archive.Package{p}, progress); err != nil {
		return t, err
	}
	if err := os.MkdirAll(filepath.Dir(t.Dir), 0o755); err != nil {
		return t, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(t.Dir), ".unpack-")
	if err != nil {
		return t, err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // gone after the rename
	if err := os.Chmod(tmp, 0o755); err != nil {
		return t, err
	}
	if err := sandbox.Own(tmp); err != nil {
		return t, err
	}
	if err := archive.Unpack(ctx, a.File(p), tmp); err != nil {
		return t, err
	}
	return t, os.Rename(tmp, t.Dir)
}

// noFunctionalChange is create-diff-object's exit status where the objects do
// the same (create-diff-object.c, EXIT_STATUS_NO_CHANGE).
const noFunctionalChange = 3

// extract runs create-diff-object on every object and reads from its output
// which functions the livepatch replaces.
func (j *job) extract(ctx context.Context, objects []object) error {
	done := j.clock.Step("diff", "extract the changed functions")
	env := sandbox.BaseEnv()
	for name, size := range j.plan.Kernel.StructSizes {
		env = append(env, name+"="+strconv.Itoa(size))
	}
	slices.Sort(env)
	if err := j.writableDir("diff"); err != nil {
		return err
	}
	for i, o := range objects {
		out := j.diffFile(o)
		res, err := j.run(ctx, sandbox.Command{Env: env, Writable: []string{j.file("diff")}, Argv: []string{j.Tools.program("create-diff-object"),
			j.file(filepath.Join("original", o.name())), j.file(filepath.Join("patched", o.name())),
			"vmlinux", j.tree.Symbols(), filepath.Join(j.tree.Source(), "Module.symvers"),
			j.plan.Sequence.ModuleName(), out}})
		if err != nil {
			return err
		}
		switch res.Exit {
		case 0:
		case noFunctionalChange:
			j.refuse(build.Refusal{Code: "nothing_changed", File: o.source,
				Rule: "the source patch changes no object code of this file: a fix must change what runs",
				Hint: "the change may be compiled out in this configuration; leave the file out, or check the fix"})
			continue
		default:
			j.refuseDiffer(o, res.Output)
			continue
		}
		diff, err := durable.ReadFile(out, livepatch.MaxModule) // of the build user: perhaps a link, or without end
		if err != nil {
			return err
		}
		if objects[i].changed, err = replacedFunctions(diff); err != nil {
			return err
		}
		if len(objects[i].changed) == 0 {
			j.refuse(build.Refusal{Code: "nothing_replaced", File: o.source,
				Rule: "the differ found a change but no function to replace", Hint: "look at the detail", Detail: shorten(res.Output)})
		}
	}
	j.onlyReplaced(objects)
	j.result.Functions = functionNames(objects)
	done(fmt.Sprintf("%d function(s)", len(j.result.Functions)))
	return nil
}

// diffFile has a flat name, so that one writable folder is enough.
func (j *job) diffFile(o object) string {
	return j.file(filepath.Join("diff", strings.ReplaceAll(o.name(), "/", "_")))
}

func (j *job) writableDir(rel string) error {
	if err := os.MkdirAll(j.file(rel), 0o755); err != nil {
		return err
	}
	return sandbox.Own(j.file(rel))
}

// complaints maps what create-diff-object says to refusals. Its texts are
// those of version 0.9.10 and 0.9.11.
var complaints = []struct {
	text       *regexp.Regexp // the first group, if any, is the function
	code       fault.Code
	rule, hint string
}{
	{regexp.MustCompile(`changed section (\S*\.data\S*) not selected for inclusion|data section (\S+) changed`), "data_changed",
		"initialized global data changed: its present value lives in the running kernel and is not replaced",
		"set the new value in a function that runs afterwards, or use a callback"},
	{regexp.MustCompile(`(?:section|changed section) (\S*\.init\S*|\S*\.exit\S*)`), "init_code",
		"code that runs only at boot or at module unload cannot be livepatched",
		"update the kernel package and reboot"},
	{regexp.MustCompile(`function (\S+) has no fentry/mcount call`), "not_traceable",
		"the function cannot be traced, so the kernel's livepatch interface cannot redirect it", "patch its callers instead"},
	{regexp.MustCompile(`Found a jump label at (\S+),? using key`), "static_key",
		"the function uses a static key that a livepatch may not use on this kernel", "use static_key_enabled in the patched function"},
	{regexp.MustCompile(`Found a static call at (\S+)`), "static_call",
		"the function uses a static call that a livepatch may not use on this kernel", "call the function through a plain pointer"},
	{regexp.MustCompile(`unreconcilable difference`), "unreconcilable",
		"the differ met a change outside of functions that it cannot carry over", "make the change smaller; move it into functions"},
	{regexp.MustCompile(`function\(s\) can not be patched`), "not_patchable",
		"a changed function cannot be patched", "see the detail for its name"},
}

func (j *job) refuseDiffer(o object, said []byte) {
	r := build.Refusal{Code: "differ_refused", File: o.source, Detail: shorten(said),
		Rule: "create-diff-object refused the change", Hint: "look at the detail; a smaller source patch often helps"}
	for _, c := range complaints {
		if m := c.text.FindSubmatch(said); m != nil {
			r.Code, r.Rule, r.Hint = c.code, c.rule, c.hint
			if len(m) > 1 {
				r.Function = string(m[1])
			}
			break
		}
	}
	j.refuse(r)
}

// replacedFunctions reads which functions a differ's output, or the module made
// of it, replaces: each has a struct kpatch_patch_func in section
// .kpatch.funcs, whose first relocation is the new function (kpatch-patch.h).
// One that cannot be named is an error: nobody could prove it.
func replacedFunctions(object []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the differ's output: %w", err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols of the differ's output: %w", err)
	}
	rela, funcs := f.Section(".rela.kpatch.funcs"), f.Section(".kpatch.funcs")
	if rela == nil && funcs == nil {
		return nil, nil
	}
	if rela == nil || funcs == nil {
		return nil, fault.New(fault.Internal, "bad_module", "the differ's output has half of its list of functions")
	}
	data, err := rela.Data()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rela.Name, err)
	}
	const entry, funcSize = 24, 56 // Elf64_Rela; struct kpatch_patch_func
	var names []string
	for ; len(data) >= entry; data = data[entry:] {
		off := binary.LittleEndian.Uint64(data)
		sym := binary.LittleEndian.Uint64(data[8:]) >> 32
		if off%funcSize != 0 || sym == 0 || sym > uint64(len(symbols)) {
			continue
		}
		s := symbols[sym-1]
		name := s.Name
		if elf.ST_TYPE(s.Info) == elf.STT_SECTION && int(s.Section) < len(f.Sections) {
			name = strings.TrimPrefix(f.Sections[s.Section].Name, ".text.")
		}
		names = append(names, name)
	}
	if uint64(len(names))*funcSize != funcs.Size {
		return nil, fault.New(fault.Internal, "bad_module", "the differ's output replaces %d functions, %d of them with a name", funcs.Size/funcSize, len(names))
	}
	return names, nil
}

// modinfo reads the key=value strings of a module's .modinfo section.
func modinfo(module []byte) (map[string][]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	sec := f.Section(".modinfo")
	if sec == nil || sec.Size > 1<<20 {
		return nil, fault.New(fault.Invalid, "", "module has no usable .modinfo section")
	}
	data, err := sec.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	out := map[string][]string{}
	sc := bufio.NewScanner(bytes.NewReader(bytes.ReplaceAll(data, []byte{0}, []byte("\n"))))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		if k, v, ok := strings.Cut(sc.Text(), "="); ok {
			out[k] = append(out[k], v)
		}
	}
	return out, sc.Err()
}
