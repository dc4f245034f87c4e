// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/lab"
)

// store is the folder of the runs of one livepatch:
//
//	RUN/inputs.json   before the story is played
//	RUN/story.txtar   its text
//	RUN/result.json   after it was played to its end
//	RUN/console.log   what the kernel printed meanwhile
//	content/SHA256    checks and other files of runs, each once
type store struct{ dir string }

// ConsoleFile is the kernel's log in the folder of a run.
const ConsoleFile = "console.log"

// Names in the folder of a run, and limits of reading them.
const (
	inputsFile = "inputs.json"
	storyFile  = "story.txtar"
	resultName = "result.json"
	contentDir = "content"

	maxJSON    = 64 << 20
	maxConsole = 1 << 20 // bytes that are kept of a console, its end
)

func (st store) path(p plan, name string) string { return filepath.Join(st.dir, p.run(), name) }

// kept is the outcome of an earlier run with the same inputs. What ended as
// broken says nothing and is played again, and so is what a rig played that
// does not say what it is.
func (st store) kept(p plan) (Scenario, bool) {
	var s Scenario
	if p.inputs.Rig.Digest == "" {
		return s, false
	}
	b, err := durable.ReadFile(st.path(p, resultName), maxJSON)
	if err != nil || json.Unmarshal(b, &s) != nil || s.Digest != p.digest || s.Verdict != lab.Pass && s.Verdict != lab.Fail {
		return s, false
	}
	s.Reused = true
	return s, true
}

// begin writes down what is about to be played. The outcome of an earlier
// run goes first: a run that does not end must not leave it behind.
func (st store) begin(p plan) error {
	if err := os.MkdirAll(filepath.Join(st.dir, p.run()), 0o755); err != nil {
		return err
	}
	if err := durable.Remove(st.path(p, resultName)); err != nil {
		return err
	}
	for id, program := range p.Checks {
		if err := st.keepContent(program); err != nil {
			return fmt.Errorf("keep the check of %s: %w", id, err)
		}
	}
	for i, f := range p.Taken {
		b, err := durable.ReadFile(f.Source, maxTakenBytes)
		if err != nil {
			return err
		}
		if digestOf(b) != p.inputs.Taken[i].SHA256 {
			return fault.New(fault.Conflict, "changed_meanwhile", "%s changed while the test ran", f.Source).WithHint("test again")
		}
		if err := st.keepContent(b); err != nil {
			return fmt.Errorf("keep %s: %w", f.Name, err)
		}
	}
	if err := durable.WriteFile(st.path(p, storyFile), p.Story.Text, 0o644); err != nil {
		return err
	}
	in := p.inputs
	in.Started = time.Now().UTC().Truncate(time.Second)
	return writeJSON(st.path(p, inputsFile), in)
}

// end writes down the outcome, the console first.
func (st store) end(p plan, s Scenario, console string) error {
	if over := len(console) - maxConsole; over > 0 {
		console = console[over:]
	}
	if err := durable.WriteFile(st.path(p, ConsoleFile), []byte(console), 0o644); err != nil {
		return err
	}
	return writeJSON(st.path(p, resultName), s)
}

func (st store) keepContent(b []byte) error {
	file := filepath.Join(st.dir, contentDir, digestOf(b))
	if _, err := os.Stat(file); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(file, b, 0o644)
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(b, '\n'), 0o644)
}
