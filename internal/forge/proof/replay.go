// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/lab/story"
)

var runPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}$`)

// Files of a replay, beside those of the run.
const (
	replayFile    = "replay.json"
	replayConsole = "replay.log"
)

// ReadRun reads the recorded inputs of a run.
func ReadRun(dir, run string) (Inputs, error) {
	var in Inputs
	if !runPattern.MatchString(run) {
		return in, fault.New(fault.Invalid, "bad_run", "%.120q does not name a run", run).WithHint("test.json and the report name the run of each scenario")
	}
	b, err := durable.ReadFile(filepath.Join(dir, run, inputsFile), maxJSON)
	if errors.Is(err, fs.ErrNotExist) {
		return in, fault.New(fault.NotFound, "no_run", "there is no run %s in %s", run, dir).WithHint("test.json and the report name the run of each scenario")
	}
	if err != nil {
		return in, err
	}
	if err := json.Unmarshal(b, &in); err != nil || in.Version != inputsVersion {
		return in, fault.New(fault.Invalid, "bad_run", "read inputs of run %s: version %d: %w", run, in.Version, err)
	}
	return in, nil
}

// Replay plays a run again from its recorded inputs: its own story, checks and
// files, whatever the publisher's data folder says today. The module, the
// kernel and the earlier sequences must still be the same bytes. What comes out
// is written beside the run and changes nothing that was judged. builds are all
// of the kernel; of t it uses the rig, the kernel, the tables, the folder and what is told.
func Replay(ctx context.Context, t Trial, run string, builds []build.Result) (Scenario, error) {
	var none Scenario
	in, err := ReadRun(t.Dir, run)
	if err != nil {
		return none, err
	}
	p := plan{name: in.Name, inputs: in}
	st := store{t.Dir}
	if p.Play, err = st.recorded(in, run); err != nil {
		return none, err
	}
	i := slices.IndexFunc(builds, func(b build.Result) bool { return b.Sequence == in.Sequence })
	if i < 0 {
		return none, fault.New(fault.NotFound, "no_build", "sequence %d of the run is not there any more", in.Sequence)
	}
	p.Built, p.Tables = builds[i], t.Tables
	p.Earlier, p.Over = earlierOf(in, builds)
	t.Built, t.Earlier, t.Checks, t.CPUs = p.Built, p.Earlier, p.Checks, in.CPUs
	now, err := t.inputs(p, in.Rig, hasher{})
	if err != nil {
		return none, err
	}
	for _, c := range []struct {
		what      string
		then, now any
	}{
		{"kernel image", in.Kernel.SHA256, now.Kernel.SHA256}, {"module", in.Module.SHA256, now.Module.SHA256},
		{"symbol table", in.Symbols.SHA256, now.Symbols.SHA256}, {"build id", in.BuildID, now.BuildID},
		{"set of earlier sequences", sums(in.Earlier), sums(now.Earlier)}, {"set of modules", sums(in.Modules), sums(now.Modules)},
		{"rig", in.Rig.name(), Rig{About: lab.Describe(t.Rig)}.name()},
	} {
		if c.then != c.now {
			return none, fault.New(fault.Conflict, "inputs_changed", "run %s had another %s: %v, now %v", run, c.what, c.then, c.now)
		}
	}
	if p.digest, err = in.digest(); err != nil {
		return none, err
	}
	return t.perform(ctx, p, func(s Scenario, console string) error {
		if err := durable.WriteFile(filepath.Join(t.Dir, run, replayConsole), []byte(console), 0o644); err != nil {
			return err
		}
		return writeJSON(filepath.Join(t.Dir, run, replayFile), s)
	})
}

// sums are the digests of inputs, in one word.
func sums(list []Input) string {
	var all []string
	for _, i := range list {
		all = append(all, i.Name+" "+i.SHA256)
	}
	return strings.Join(all, ", ")
}

// recorded reads story, checks and files of a run.
func (st store) recorded(in Inputs, run string) (player.Play, error) {
	p := player.Play{CPUs: in.CPUs, Busy: in.Busy}
	text, err := durable.ReadFile(filepath.Join(st.dir, run, storyFile), story.MaxText+1)
	if err != nil {
		return p, err
	}
	if digestOf(text) != in.Story {
		return p, fault.New(fault.Untrusted, "bad_run", "the story of run %s is not the recorded one", run)
	}
	// The file's name is its story's: the last element of the run's.
	name := filepath.Base(in.Name)
	if in.Over > 0 {
		name = eachSuffix.ReplaceAllString(name, "")
	}
	if p.Story, err = story.Parse(name+".txtar", text, player.Grammar()); err != nil {
		return p, err
	}
	p.Checks = map[cve.ID][]byte{}
	for _, c := range in.Checks {
		if p.Checks[cve.ID(c.Name)], err = st.content(c); err != nil {
			return p, err
		}
	}
	for _, f := range in.Taken {
		b, err := st.content(f)
		if err != nil {
			return p, err
		}
		p.Taken = append(p.Taken, lab.File{Name: f.Name, Data: b, Mode: fs.FileMode(f.Mode).Perm()})
	}
	return p, nil
}

var eachSuffix = regexp.MustCompile(`-sequence-[0-9]+$`)

// content reads a file that begin kept.
func (st store) content(in Input) ([]byte, error) {
	b, err := durable.ReadFile(filepath.Join(st.dir, contentDir, in.SHA256), maxTakenBytes)
	if err == nil && digestOf(b) != in.SHA256 {
		err = fault.New(fault.Untrusted, "bad_run", "what was kept of %s is not the recorded content", in.Name)
	}
	return b, err
}
