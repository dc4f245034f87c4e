// SPDX-License-Identifier: Apache-2.0

// Package proof tries one built livepatch on the kernel that it is for: it
// boots that stock kernel in the lab, shows each flaw, loads the livepatch from
// clean and over every earlier sequence, and shows that each flaw is gone.
//
// A finished transition is no proof of a fix: a half-imported one loads and
// does nothing. A fix without a check is called unchecked, and stays so down
// to the machines.
package proof

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/guest"
	"klatch/internal/livepatch"
)

// Exit statuses of a check program.
const (
	checkFixed = 0
	checkFlaw  = 1
)

// transitionLimit is how long a transition on an idle guest may take. The
// kernel looks once a second and signals after 15 s (kernel/livepatch/
// transition.c, SIGNALS_TIMEOUT); emulation is slow.
const transitionLimit = 45 * time.Second

// insertLimit is how long the kernel may take to insert a module. One of 200
// functions takes over a minute on a busy emulated machine.
const insertLimit = 5 * time.Minute

// Scenario is one story and how it ended.
type Scenario struct {
	Name    string      `json:"name"`
	Verdict lab.Verdict `json:"verdict"`
	Why     string      `json:"why,omitempty"`
	Note    string      `json:"note,omitempty"` // what was counted
	Seconds float64     `json:"seconds"`
}

// Result is the outcome for one livepatch; its JSON is a promise, version 1.
type Result struct {
	Version      int                `json:"version"`
	Verdict      lab.Verdict        `json:"verdict"`
	Sequence     livepatch.Sequence `json:"sequence"`
	ModuleSHA256 string             `json:"module_sha256"`
	Kernel       string             `json:"kernel"`
	BuildID      string             `json:"build_id"`
	Scenarios    []Scenario         `json:"scenarios"`
	Fixes        []livepatch.Fix    `json:"fixes"`
	Trouble      []lab.Trouble      `json:"trouble"`
}

// Trial is what is tried.
type Trial struct {
	Rig     lab.Rig
	Kernel  string // image to boot
	Built   build.Result
	Earlier []build.Result
	Tables  Tables
	Checks  map[cve.ID][]byte // program per fix; a fix without one is unchecked
	CPUs    int               // of the machine; 0 means the rig's choice
	Busy    time.Duration     // how long the busy machine is busy; 0 means DefaultBusy
	Tell    func(what string) (done func(note string))
}

// DefaultBusy is how long the machine is kept busy around a load: long enough
// for the transition of a busy machine, and for what a livepatch breaks in
// files, sockets, processes and memory to show.
const DefaultBusy = 15 * time.Second

type run struct {
	Trial
	m      lab.Machine
	result Result
	note   string // of the scenario that runs

	modules []string // that the livepatch reaches, and what they need
	present []string // of these, loaded
}

// Run does all scenarios in two boots. An error is the lab's or ours; what the
// livepatch did wrong is in the result.
func Run(ctx context.Context, t Trial) (Result, error) {
	r := &run{Trial: t, result: Result{Version: 1, Verdict: lab.Pass, Sequence: t.Built.Sequence,
		ModuleSHA256: t.Built.Module.SHA256, Kernel: string(t.Built.Kernel), BuildID: t.Built.BuildID.String(),
		Scenarios: []Scenario{}, Fixes: []livepatch.Fix{}, Trouble: []lab.Trouble{}}}
	var err error
	if r.modules, err = r.reached(); err != nil {
		return r.result, err
	}
	done := t.Tell("boot " + string(t.Built.Kernel) + " in the lab")
	m, err := t.Rig.Boot(ctx, lab.Spec{Name: "proof", Kernel: t.Kernel, Files: r.files(), CPUs: t.CPUs})
	if err != nil {
		r.add("boot", time.Now(), err)
		return r.result, nil
	}
	defer m.Close() //nolint:errcheck // the result is known
	r.m = m
	done("")
	r.story(ctx)
	r.fixes()
	return r.result, nil
}

func (r *run) files() []lab.File {
	var fs []lab.File
	for _, b := range append([]build.Result{r.Built}, r.Earlier...) {
		fs = append(fs, lab.File{Name: moduleFile(b), Source: b.Module.Path})
	}
	for _, m := range r.modules {
		fs = append(fs, lab.File{Name: m + ".ko", Source: r.Tables.Module(m)})
	}
	for id, program := range r.Checks {
		fs = append(fs, lab.File{Name: checkFile(id), Data: program, Mode: 0o755})
	}
	return fs
}

func moduleFile(b build.Result) string { return b.Sequence.ModuleName() + ".ko" }
func checkFile(id cve.ID) string       { return "check-" + string(id) }

// story runs the scenarios in order and stops at the first that does not
// pass: what follows would only tell of its consequences.
func (r *run) story(ctx context.Context) {
	name := r.Built.Sequence.ModuleName()
	type step struct {
		name string
		do   func(context.Context) error
	}
	steps := []step{{"same-kernel", r.sameKernel}}
	if len(r.modules) > 0 {
		steps = append(steps, step{"load-modules", r.loadModules})
	}
	steps = append(steps, []step{
		{"symbols", r.symbols},
		{"flaws-show-before", func(ctx context.Context) error { return r.check(ctx, checkFlaw) }},
		{"load-from-clean", func(ctx context.Context) error { return r.load(ctx, r.Built) }},
		{"positions", r.positions},
		{"modules-again", r.modulesAgain},
		{"flaws-gone-after", func(ctx context.Context) error { return r.check(ctx, checkFixed) }},
		{"disable", func(ctx context.Context) error { return r.disable(ctx, name) }},
		{"flaws-back-after-disable", func(ctx context.Context) error { return r.check(ctx, checkFlaw) }},
	}...)
	steps = slices.DeleteFunc(steps, func(s step) bool {
		return s.name == "modules-again" && len(r.modules) == 0 || s.name == "symbols" && r.Tables.Vmlinux == ""
	})
	steps = append(steps, step{"load-on-a-busy-machine", r.busy})
	for _, e := range r.Earlier {
		steps = append(steps, step{fmt.Sprintf("replace-sequence-%d", e.Sequence), func(ctx context.Context) error { return r.replace(ctx, e) }})
	}
	steps = append(steps, step{"load-after-reboot", r.reboot})
	for _, s := range steps {
		done := r.Tell(strings.ReplaceAll(s.name, "-", " "))
		start := time.Now()
		ok := r.add(s.name, start, s.do(ctx))
		last := r.result.Scenarios[len(r.result.Scenarios)-1]
		done(string(last.Verdict))
		if !ok {
			return
		}
	}
}

// add judges one scenario by its error and by what the kernel printed.
func (r *run) add(name string, start time.Time, err error) bool {
	console := ""
	if r.m != nil {
		var cerr error
		if console, cerr = r.m.Console(); cerr != nil {
			err = errors.Join(err, cerr)
		}
	}
	s := Scenario{Name: name, Verdict: lab.Pass, Note: r.note, Seconds: time.Since(start).Seconds()}
	r.note = ""
	verdict, trouble := lab.Judge(err, console)
	s.Verdict = verdict
	switch {
	case err != nil:
		s.Why = err.Error()
	case len(trouble) > 0:
		s.Why = trouble[0].Title
	}
	r.result.Scenarios = append(r.result.Scenarios, s)
	r.result.Trouble = append(r.result.Trouble[:0], trouble...)
	if verdict != lab.Pass {
		r.result.Verdict = verdict
	}
	return verdict == lab.Pass
}

// fixes says which fixes were shown to work.
func (r *run) fixes() {
	for _, id := range r.Built.Fixes {
		c := livepatch.Unchecked
		if r.Checks[id] != nil && r.result.Verdict == lab.Pass {
			c = livepatch.Passed
		}
		r.result.Fixes = append(r.result.Fixes, livepatch.Fix{CVE: id, Check: c})
	}
}

func (r *run) sameKernel(ctx context.Context) error {
	out, err := r.output(ctx, "uname", "-r")
	if err != nil {
		return err
	}
	if out != string(r.Built.Kernel) {
		return lab.Brokenf(fmt.Errorf("it runs %q", out), "boot kernel %s", r.Built.Kernel)
	}
	return nil
}

// check runs every check and wants the same answer from all.
func (r *run) check(ctx context.Context, want int) error {
	for _, id := range r.Built.Fixes {
		if r.Checks[id] == nil {
			continue
		}
		res, err := r.m.Run(ctx, lab.Command{Argv: []string{lab.FilesDir + "/" + checkFile(id)}, Timeout: 30 * time.Second})
		if err != nil {
			return err
		}
		said := strings.TrimSpace(string(res.Stdout) + string(res.Stderr))
		switch {
		case res.TimedOut:
			return lab.Failf("check of %s did not end in time: %s", id, said)
		case res.Exit == want:
		case res.Exit == checkFlaw:
			return lab.Failf("the flaw %s still shows: %s", id, said)
		case res.Exit == checkFixed:
			return lab.Failf("the flaw %s does not show on the unpatched kernel, so its check proves nothing: %s", id, said)
		default:
			return lab.Failf("check of %s could not find out (exit status %d): %s", id, res.Exit, said)
		}
	}
	return nil
}

// load inserts a livepatch and waits for its transition.
func (r *run) load(ctx context.Context, b build.Result) error {
	res, err := r.m.Run(ctx, lab.Command{Argv: []string{"insmod", lab.FilesDir + "/" + moduleFile(b)}, Timeout: insertLimit})
	if err != nil {
		return err
	}
	if res.TimedOut {
		return lab.Failf("load %s: it did not end within %s", moduleFile(b), insertLimit)
	}
	if res.Exit != 0 {
		return lab.Failf("load %s: %s", moduleFile(b), strings.TrimSpace(string(res.Stderr)))
	}
	name := b.Sequence.ModuleName()
	if err := r.await(ctx, "transition of "+name, func() (bool, error) {
		out, err := r.output(ctx, "cat", "/sys/kernel/livepatch/"+name+"/transition")
		return out == "0", err
	}); err != nil {
		return err
	}
	out, err := r.output(ctx, "cat", "/sys/kernel/livepatch/"+name+"/enabled")
	if err != nil {
		return err
	}
	if out != "1" {
		return lab.Failf("%s is not enabled after its transition: %q", name, out)
	}
	return nil
}

// disable takes a livepatch out and unloads its module.
func (r *run) disable(ctx context.Context, name string) error {
	if _, err := r.output(ctx, "sh", "-c", "echo 0 > /sys/kernel/livepatch/"+name+"/enabled"); err != nil {
		return err
	}
	if err := r.await(ctx, "end of "+name, func() (bool, error) {
		out, err := r.output(ctx, "ls", "/sys/kernel/livepatch")
		return !strings.Contains(out, name), err
	}); err != nil {
		return err
	}
	_, err := r.output(ctx, "rmmod", name)
	return err
}

// busy loads on a machine that is at work, lets it work on, and takes the
// livepatch out while it still does.
func (r *run) busy(ctx context.Context) error {
	d := cmp.Or(r.Busy, DefaultBusy)
	worked := make(chan error, 1)
	go func() {
		res, err := r.m.Run(ctx, lab.Command{Argv: []string{"/proc/1/exe", guest.LoadArg, d.String()}, Timeout: 2*d + transitionLimit})
		if err == nil && (res.Exit != 0 || res.TimedOut) {
			err = lab.Failf("work on the patched machine went wrong: %s", strings.TrimSpace(string(res.Stderr)))
		}
		worked <- err
	}()
	begin := time.NewTimer(time.Second)
	defer begin.Stop()
	select {
	case err := <-worked:
		return cmp.Or(err, lab.Brokenf(errors.New("it ended at once"), "put load on the machine"))
	case <-begin.C:
	}
	if err := r.load(ctx, r.Built); err != nil {
		return err
	}
	if err := <-worked; err != nil {
		return err
	}
	if err := r.check(ctx, checkFixed); err != nil {
		return err
	}
	return r.disable(ctx, r.Built.Sequence.ModuleName())
}

// reboot starts the machine anew: the flaws are back, and the livepatch loads
// again.
func (r *run) reboot(ctx context.Context) error {
	if err := r.m.Reboot(ctx); err != nil {
		return err
	}
	if err := r.check(ctx, checkFlaw); err != nil {
		return err
	}
	if err := r.load(ctx, r.Built); err != nil {
		return err
	}
	return r.check(ctx, checkFixed)
}

// replace loads an earlier sequence, then ours over it: exactly one must be
// enabled afterwards, and all flaws gone.
func (r *run) replace(ctx context.Context, earlier build.Result) error {
	if err := r.load(ctx, earlier); err != nil {
		return err
	}
	if err := r.load(ctx, r.Built); err != nil {
		return err
	}
	name := r.Built.Sequence.ModuleName()
	out, err := r.output(ctx, "ls", "/sys/kernel/livepatch")
	if err != nil {
		return err
	}
	if strings.Join(strings.Fields(out), " ") != name {
		return lab.Failf("after %s replaced %s the kernel has %q", name, earlier.Sequence.ModuleName(), out)
	}
	if err := r.check(ctx, checkFixed); err != nil {
		return err
	}
	if _, err := r.output(ctx, "rmmod", earlier.Sequence.ModuleName()); err != nil {
		return err
	}
	return r.disable(ctx, name)
}

// await polls until it is so.
func (r *run) await(ctx context.Context, what string, so func() (bool, error)) error {
	deadline := time.Now().Add(transitionLimit)
	for {
		ok, err := so()
		if err != nil || ok {
			return err
		}
		if time.Now().After(deadline) {
			return lab.Failf("%s did not come within %s", what, transitionLimit)
		}
		select {
		case <-ctx.Done():
			return lab.Brokenf(ctx.Err(), "wait for %s", what)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// output runs a program that must work.
func (r *run) output(ctx context.Context, argv ...string) (string, error) {
	res, err := r.m.Run(ctx, lab.Command{Argv: argv})
	if err != nil {
		return "", err
	}
	if res.Exit != 0 {
		return "", lab.Failf("%s ended with status %d: %s", strings.Join(argv, " "), res.Exit, strings.TrimSpace(string(res.Stderr)))
	}
	return strings.TrimSpace(string(res.Stdout)), nil
}

const resultFile = "test.json"

// Keep writes a result beside the build.
func Keep(buildDir string, r Result) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(buildDir, resultFile), append(b, '\n'), 0o644)
}

// Read returns the result for one module, which must be a pass for exactly
// these bytes.
func Read(buildDir string, built build.Result) (Result, error) {
	var r Result
	b, err := durable.ReadFile(filepath.Join(buildDir, resultFile), 16<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return r, fault.New(fault.Denied, "not_tested", "sequence %d of %s was not tested", built.Sequence, built.Kernel).
			WithHint("klatch-forge test --kernel %s", built.Kernel)
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read test result: %w", err)
	}
	switch {
	case r.ModuleSHA256 != built.Module.SHA256 || r.BuildID != built.BuildID.String():
		return r, fault.New(fault.Denied, "not_tested", "the test result is for another module than sequence %d of %s", built.Sequence, built.Kernel).
			WithHint("klatch-forge test --kernel %s", built.Kernel)
	case r.Verdict != lab.Pass:
		return r, fault.New(fault.Denied, "test_failed", "the test of sequence %d of %s ended %s", built.Sequence, built.Kernel, r.Verdict).
			WithHint("look at %s", filepath.Join(buildDir, resultFile))
	}
	return r, nil
}
