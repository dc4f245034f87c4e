// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Flags of the compilations. -g0 leaves the code as it is (the match proof
// would show otherwise) and saves half of the time. Separate sections let
// create-diff-object see which function changed; a function that does not
// match then is compared as shipped, without them.
const (
	flagsAsShipped = "-g0"
	flagsForDiff   = "-g0 -ffunction-sections -fdata-sections"
)

// recipe is kept beside a compiled object.
type recipe struct {
	Command string   `json:"command"`
	Deps    []string `json:"deps"`
}

const (
	maxRecipe   = 1 << 20
	makeAtOnce  = 200     // targets of one call
	maxLog      = 4 << 20 // of one compilation, in bytes
	objectsData = "objbuild/3"
)

// compileOriginal compiles the reached files unpatched. They are kept in the
// cache, because they do not depend on the source patches.
func (j *job) compileOriginal(ctx context.Context) error {
	done := j.clock.Step("compile_original", fmt.Sprintf("compile %d file(s) unpatched", len(j.objects)))
	var missing []*object
	for _, o := range j.objects {
		if err := j.fromCache(o); err != nil {
			missing = append(missing, o)
		}
	}
	reused := len(j.objects) - len(missing)
	for part := range slices.Chunk(missing, makeAtOnce) {
		if err := j.compileUnpatched(ctx, part); err != nil {
			return err
		}
	}
	if reused > 0 {
		done(fmt.Sprintf("%d reused", reused))
	} else {
		done("")
	}
	return nil
}

func (j *job) fromCache(o *object) error {
	file := j.cached(o, flagsForDiff)
	b, err := durable.ReadFile(file+".json", maxRecipe)
	if err != nil {
		return err
	}
	var r recipe
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	if _, err := os.Stat(file); err != nil {
		return err
	}
	o.original, o.cmd, o.deps = file, r.Command, r.Deps
	return nil
}

func (j *job) compileUnpatched(ctx context.Context, objects []*object) error {
	args := []string{"-k", "KCFLAGS=" + flagsForDiff}
	for _, o := range objects {
		if !slices.Contains(args, o.unit.Target) {
			args = append(args, o.unit.Target)
		}
	}
	res, err := j.make(ctx, args...)
	if err != nil {
		return err
	}
	if res.Exit != 0 {
		return fault.New(fault.Internal, "compile", "compile unpatched: %s", strings.Join(complaintsOf(res.Output), "\n"))
	}
	for _, o := range objects {
		b, err := durable.ReadFile(j.upper(o.unit.Target), livepatch.MaxModule)
		if err != nil {
			return fault.New(fault.Internal, "compile", "compile %s unpatched: %s", o.unit.Source, strings.Join(complaintsOf(res.Output), "\n"))
		}
		text, err := durable.ReadFile(j.upper(path.Join(path.Dir(o.unit.Target), "."+path.Base(o.unit.Target)+".cmd")), maxRecipe)
		if err != nil {
			return fault.New(fault.Internal, "compile", "compile %s unpatched: its command: %w", o.unit.Source, err)
		}
		r, err := readRecipe(text)
		if err != nil {
			return fmt.Errorf("command of %s: %w", o.unit.Target, err)
		}
		rec, err := json.Marshal(r)
		if err != nil {
			return err
		}
		file := j.cached(o, flagsForDiff)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := durable.WriteFile(file, b, 0o644); err != nil {
			return err
		}
		if err := durable.WriteFile(file+".json", rec, 0o644); err != nil {
			return err
		}
		o.original, o.cmd, o.deps = file, r.Command, r.Deps
	}
	return nil
}

// readRecipe reads a .cmd file of kbuild: the command, and after fixdep the
// files that the object depends on (scripts/Kbuild.include, scripts/basic/fixdep.c).
func readRecipe(text []byte) (recipe, error) {
	var r recipe
	inDeps := false
	for raw := range bytes.Lines(text) {
		line := strings.TrimRight(string(raw), "\n")
		name, value, ok := strings.Cut(line, " := ")
		switch {
		case r.Command == "" && ok && (strings.HasPrefix(name, "cmd_") || strings.HasPrefix(name, "savedcmd_")):
			r.Command = value
		case strings.HasPrefix(name, "source_") && ok:
			r.Deps = append(r.Deps, value)
		case strings.HasPrefix(line, "deps_"):
			inDeps = true
		case inDeps:
			d := strings.TrimSpace(strings.TrimSuffix(line, "\\"))
			if d == "" {
				inDeps = false
			} else if !strings.HasPrefix(d, "$") && !path.IsAbs(d) {
				r.Deps = append(r.Deps, path.Clean(d))
			}
		}
	}
	if r.Command == "" || len(r.Deps) == 0 || strings.ContainsAny(r.Command, "\r\n") {
		return r, fault.New(fault.Internal, "bad_recipe", "no command, or no dependencies")
	}
	return r, nil
}

// key is the digest of all that an unpatched object depends on.
func (j *job) key(o *object, flags string) string {
	e := j.plan.Kernel
	parts := []string{objectsData, string(e.Release), e.SourceV, e.BuildID.String(),
		j.config, e.CC, j.compiler, e.ExtraCFlags, flags, o.unit.Target}
	if j.delayed {
		parts = append(parts, "objtool now")
	}
	if e.Buildroot != "" {
		parts = append(parts, e.Buildroot, j.root.Digest)
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:])
}

func (j *job) cached(o *object, flags string) string {
	k := j.key(o, flags)
	return filepath.Join(j.Cache, "objects", k[:2], k+".o")
}

// more says whether a patch adds an #include to what an object is compiled
// from: then it may read files that nobody has listed.
func (j *job) more(o *object) bool {
	for f := range j.adds {
		if f == o.unit.Source || slices.Contains(o.deps, f) {
			return true
		}
	}
	return false
}

// cachedPatched is where a patched object is kept. It depends on the touched
// files that it is compiled from, and where a patch adds an #include to one of
// them, perhaps on all.
func (j *job) cachedPatched(o *object) string {
	parts := []string{"patched", j.key(o, flagsForDiff)}
	more := j.more(o)
	for _, f := range slices.Sorted(mapKeys(j.touched)) {
		if more || f == o.unit.Source || slices.Contains(o.deps, f) {
			parts = append(parts, f, j.touched[f])
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	k := hex.EncodeToString(sum[:])
	return filepath.Join(j.Cache, "objects", k[:2], k+".o")
}

func mapKeys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// apply applies the source patches in order. A patch must fit exactly: moved
// lines are accepted, other context is not.
func (j *job) apply(ctx context.Context) error {
	done := j.clock.Step("apply", fmt.Sprintf("apply %d source patch(es)", len(j.plan.Patches)))
	for i, p := range j.plan.Patches {
		res, err := j.run(ctx, sandbox.Command{Stdin: bytes.NewReader(p.Diff), Argv: queue.ApplyCommand()})
		if err != nil {
			return err
		}
		switch res.Exit {
		case 0:
		case 1: // some hunks cannot be applied (patch(1), EXIT STATUS); anything else is trouble of our own
			r := build.Refuse("patch_does_not_apply", strings.Join(p.Files, ", "))
			r.Rule = fmt.Sprintf("%s; source patch %s does not", r.Rule, p.Name)
			rejects, err := durable.ReadFile(j.upper(queue.Rejects), maxSource)
			if err != nil {
				return fmt.Errorf("rejected hunks of %s: %w", p.Name, err)
			}
			r.Detail = shorten([]byte(compose.Conflict(j.plan.Patches[:i], p, res.Output, rejects)))
			j.refuse(r)
			return nil
		default:
			return fault.New(fault.Internal, "patch", "patch(1) ended with status %d: %s", res.Exit, shorten(res.Output))
		}
	}
	j.touched = map[string]string{}
	for _, f := range j.plan.Files() {
		b, err := durable.ReadFile(j.upper(f), maxSource)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		j.touched[f] = hex.EncodeToString(sum[:])
	}
	done("")
	return nil
}

// maxSource limits a source file, in bytes.
const maxSource = 16 << 20

// compilePatched compiles again, with the very commands that the unpatched
// objects were made with.
func (j *job) compilePatched(ctx context.Context) error {
	done := j.clock.Step("compile_patched", fmt.Sprintf("compile %d file(s) patched", len(j.objects)))
	var missing []*object
	for _, o := range j.objects {
		o.patched = j.cachedPatched(o)
		if !exists(o.patched) {
			missing = append(missing, o)
		}
	}
	if len(missing) > 0 {
		var ts []task
		for _, o := range missing {
			ts = append(ts, task{out: o.unit.Target, command: o.cmd, log: o.unit.Target + ".log"})
		}
		res, err := j.runTasks(ctx, ts, nil)
		if err != nil {
			return err
		}
		for _, o := range missing {
			if err := j.takePatched(o, res); err != nil {
				return err
			}
		}
	}
	done(fmt.Sprintf("%d reused", len(j.objects)-len(missing)))
	return nil
}

// takePatched keeps an object that a batch has compiled. Only where its own
// command says that it ended well: an object that is there may be of an
// earlier step.
func (j *job) takePatched(o *object, batch sandbox.Result) error {
	if !exists(j.upper(o.unit.Target + ".log" + endedWell)) {
		log, err := durable.ReadFile(j.upper(o.unit.Target+".log"), maxLog)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return j.notCompiled(o, sandbox.Result{Output: append(log, batch.Output...)}, fs.ErrNotExist)
	}
	b, err := durable.ReadFile(j.upper(o.unit.Target), livepatch.MaxModule)
	if err != nil {
		return j.notCompiled(o, batch, err)
	}
	if err := os.MkdirAll(filepath.Dir(o.patched), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(o.patched, b, 0o644)
}

// endedWell is added to the name of a log when its command ended well.
const endedWell = ".ok"

// task is one command of a batch.
type task struct {
	out     string // file that it makes, removed before
	command string // as make reads it
	log     string // file for what the command says; empty: the log of all
}

// runTasks runs commands side by side, in one sandbox: two of them could not
// share the scratch folder.
func (j *job) runTasks(ctx context.Context, ts []task, writable []string) (sandbox.Result, error) {
	var m strings.Builder
	m.WriteString("pound := \\#\nMAKEFLAGS += -r\nall:")
	var rules strings.Builder
	seen := map[string]bool{}
	for i, t := range ts {
		if seen[t.out] {
			continue
		}
		seen[t.out] = true
		fmt.Fprintf(&m, " t%d", i)
		command := t.command
		if t.log != "" {
			command = fmt.Sprintf("rm -f '%[2]s%[3]s'; { %[1]s; } > '%[2]s' 2>&1; : > '%[2]s%[3]s'", command, t.log, endedWell)
		}
		fmt.Fprintf(&rules, "t%d:\n\t@set -e; rm -f '%s'; %s\n", i, t.out, command)
	}
	m.WriteString("\n.PHONY: all\n")
	m.WriteString(rules.String())
	file := j.file("tasks.mk")
	if err := j.write(file, []byte(m.String())); err != nil {
		return sandbox.Result{}, err
	}
	return j.run(ctx, sandbox.Command{Writable: writable, Env: j.env(),
		Argv: []string{"make", "-k", "-s", fmt.Sprintf("-j%d", runtime.NumCPU()), "-f", file}})
}
