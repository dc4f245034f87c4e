// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build/layout"
	"klatch/internal/livepatch"
)

// Compilations for their types only. -flto writes the debug information of the
// source as it was read and leaves out the code, which saves 40 % of the time;
// where that does not work, there is the usual way. All types are written,
// used or not, so that one unit tells of all that its headers define.
const (
	typesOnly   = "-g -gdwarf-5 -flto -fno-eliminate-unused-debug-types"
	typesToo    = "-g -gdwarf-5 -fno-var-tracking -fno-eliminate-unused-debug-types"
	typesSuffix = ".types"
	layoutData  = "layout/1" // changes when a stored form does
)

// changesOf compares the types of both builds of each object. What it found is
// kept, and the types of the unpatched objects are.
func (j *job) changesOf(ctx context.Context, objects []*object) ([][]layout.Change, error) {
	all := make([][]layout.Change, len(objects))
	var missing []*object
	for i, o := range objects {
		b, err := durable.ReadFile(j.changesFile(o), layout.MaxEncoded)
		if err != nil || json.Unmarshal(b, &all[i]) != nil {
			missing = append(missing, o)
		}
	}
	if len(missing) == 0 {
		return all, nil
	}
	was, err := j.unpatchedTypes(ctx, missing)
	if err != nil {
		return nil, err
	}
	is, err := j.compileTypes(ctx, missing)
	if err != nil {
		return nil, err
	}
	for i, o := range objects {
		before, after := was[o], is[o]
		if before == nil {
			continue
		}
		all[i] = layout.Compare(before, after)
		b, err := json.Marshal(all[i])
		if err != nil {
			return nil, err
		}
		if err := durable.WriteFile(j.changesFile(o), b, 0o644); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// changesFile lies beside the patched object, whose name tells all that went
// into it.
func (j *job) changesFile(o *object) string {
	return strings.TrimSuffix(o.patched, ".o") + "." + strings.ReplaceAll(layoutData, "/", "-") + ".json"
}

// unpatchedTypes reads the types of unpatched objects. The patches are applied
// by now, so what is missing is compiled in a scratch folder of its own.
func (j *job) unpatchedTypes(ctx context.Context, objects []*object) (map[*object]*layout.Types, error) {
	out := map[*object]*layout.Types{}
	var missing []*object
	for _, o := range objects {
		b, err := durable.ReadFile(j.cached(o, layoutData+typesOnly), layout.MaxEncoded)
		if err == nil {
			out[o], err = layout.Decode(b)
		}
		if err != nil {
			missing = append(missing, o)
		}
	}
	clean := *j
	clean.scratch = j.file("unpatched-types")
	made, err := clean.compileTypes(ctx, missing)
	if err != nil {
		return nil, err
	}
	for _, o := range missing {
		out[o] = made[o]
		b, err := made[o].Encode()
		if err != nil {
			return nil, err
		}
		file := j.cached(o, layoutData+typesOnly)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return nil, err
		}
		if err := durable.WriteFile(file, b, 0o644); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// compileTypes compiles objects for their types, with the recipe of each but
// for its flags, and reads them.
func (j *job) compileTypes(ctx context.Context, objects []*object) (map[*object]*layout.Types, error) {
	out := map[*object]*layout.Types{}
	for _, flags := range []string{typesOnly, typesToo} {
		var ts []task
		for _, o := range objects {
			if out[o] == nil {
				command, err := typesCommand(o, flags)
				if err != nil {
					return nil, err
				}
				ts = append(ts, task{out: o.unit.Target + typesSuffix, command: command})
			}
		}
		if len(ts) == 0 {
			return out, nil
		}
		if _, err := j.runTasks(ctx, ts, nil); err != nil {
			return nil, err
		}
		if err := j.readTypes(objects, typesSuffix, out); err != nil {
			return nil, err
		}
	}
	// A source that the build makes from another file is there only after make.
	args := []string{"-k", "KCFLAGS=" + typesToo}
	for _, o := range objects {
		if out[o] != nil {
			continue
		}
		args = append(args, o.unit.Target)
		if err := os.Remove(j.upper(o.unit.Target)); err != nil && !os.IsNotExist(err) { // an earlier one, without types
			return nil, err
		}
	}
	if len(args) == 2 {
		return out, nil
	}
	res, err := j.make(ctx, args...)
	if err != nil {
		return nil, err
	}
	if err := j.readTypes(objects, "", out); err != nil {
		return nil, err
	}
	for _, o := range objects {
		if out[o] == nil {
			return nil, fault.New(fault.Internal, "compile", "compile %s with debug information: %s", o.unit.Source, strings.Join(complaintsOf(res.Output), "\n"))
		}
	}
	return out, nil
}

// readTypes reads what a compilation made, and removes it: it is large.
func (j *job) readTypes(objects []*object, suffix string, into map[*object]*layout.Types) error {
	for _, o := range objects {
		if into[o] != nil {
			continue
		}
		file := j.upper(o.unit.Target + suffix)
		b, err := durable.ReadFile(file, 4*livepatch.MaxModule)
		if os.IsNotExist(err) {
			continue
		}
		if err == nil {
			into[o], err = layout.Read(b)
		}
		if err != nil {
			return fmt.Errorf("types of %s: %w", o.unit.Source, err)
		}
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	return nil
}

// typesCommand turns the recipe of an object into one for its types: other
// flags, another output, and nothing of what kbuild does to the object later.
func typesCommand(o *object, flags string) (string, error) {
	compile, _, _ := strings.Cut(o.cmd, " ; ")
	to := "-o " + o.unit.Target + " "
	if !strings.Contains(compile, flagsForDiff) || strings.Count(compile, to) != 1 {
		return "", fault.New(fault.Internal, "bad_recipe", "the command of %s is not one that compiles it with flags of ours: %.200q", o.unit.Target, o.cmd)
	}
	compile = strings.Replace(compile, flagsForDiff, flags, 1)
	return strings.Replace(compile, to, "-o "+o.unit.Target+typesSuffix+" ", 1), nil
}
