// SPDX-License-Identifier: Apache-2.0

// Package build runs a build plan with a driver and says how it ended. Blame
// is part of the result: "refused" is about the fix and names the rule,
// "broken" is about the builder and may be tried again.
package build

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/compose"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Outcome is the word that a result begins with.
type Outcome string

// The outcomes.
const (
	Built   Outcome = "built"
	Refused Outcome = "refused"
	Broken  Outcome = "broken"
	// NotAffected: the kernel was built from none of the touched files.
	NotAffected Outcome = "not_affected"
)

// Refusal is a builder's no, with the place and the rule.
type Refusal struct {
	Code     fault.Code `json:"code"`
	File     string     `json:"file"`
	Function string     `json:"function"`
	Rule     string     `json:"rule"`
	Hint     string     `json:"hint"`
	Type     string     `json:"type,omitempty"`    // data type, such as "struct sock"
	Section  string     `json:"section,omitempty"` // of the object file
	Through  []string   `json:"through,omitempty"` // touched files that this one includes: the change came through them
	Detail   string     `json:"detail,omitempty"`  // what a tool said, shortened
}

// Module is the built file, not signed yet.
type Module struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
	Bytes  int64  `json:"bytes"`
}

// Result is the outcome of one build; its JSON is a promise, version 1.
type Result struct {
	Version   int                  `json:"version"`
	Result    Outcome              `json:"result"`
	Kernel    kernel.Release       `json:"kernel"`
	Distro    kernel.Distro        `json:"distro"`
	Arch      kernel.Arch          `json:"arch"`
	BuildID   kernel.BuildID       `json:"build_id"`
	Sequence  livepatch.Sequence   `json:"sequence"`
	Plan      string               `json:"plan"`
	Module    *Module              `json:"module"` // null unless built
	Fixes     []cve.ID             `json:"fixes"`
	Functions []livepatch.Function `json:"functions"`
	Match     match.Report         `json:"match"`
	Refusals  []Refusal            `json:"refusals"`
	Warnings  []Refusal            `json:"warnings"`        // what a reviewer must look at; the livepatch was built
	NotBuilt  []string             `json:"not_built"`       // touched files that this kernel was not built from
	Unchanged []string             `json:"unchanged"`       // compiled source files whose code stays the same
	Error     string               `json:"error,omitempty"` // why broken
	Hint      string               `json:"hint,omitempty"`  // what to do about it, if known
	Seconds   map[string]float64   `json:"seconds"`
}

// KernelBuild is the kernel build that the livepatch is for.
func (r Result) KernelBuild() kernel.Build {
	return kernel.Build{Distro: r.Distro, Arch: r.Arch, Release: r.Kernel, ID: r.BuildID}
}

// ExitStatus is 0 for built, 3 for refused, 4 where the kernel is not
// affected; broken is 75, because the same build may work later or elsewhere,
// unless the cause is our own bug.
func (r Result) ExitStatus() int {
	switch r.Result {
	case Built:
		return 0
	case Refused:
		return 3
	case NotAffected:
		return 4
	default:
		return 75
	}
}

// Builder is a driver. Build writes the module into dir, which is empty, and
// fills in everything but Version, Plan and Sequence. It must give the same
// bytes for the same plan, wherever and whenever it runs. A refusal is a
// result; an error means broken.
type Builder interface {
	Build(ctx context.Context, p compose.Plan, dir string, clock *Clock) (Result, error)
}

// Clock measures the steps of a build and tells them to a person.
type Clock struct {
	seconds map[string]float64
	tell    func(step string) (done func(note string))
}

// NewClock makes a clock; tell may be nil.
func NewClock(tell func(step string) (done func(note string))) *Clock {
	return &Clock{map[string]float64{}, tell}
}

// Step starts a step; the returned function ends it.
func (c *Clock) Step(name, what string) func(note string) {
	start := time.Now()
	done := func(string) {}
	if c.tell != nil {
		done = c.tell(what)
	}
	return func(note string) {
		c.seconds[name] += time.Since(start).Seconds()
		done(note)
	}
}

// Dir is the folder of one built livepatch in a publisher's data folder.
func Dir(dataDir string, r kernel.Release, s livepatch.Sequence) string {
	return filepath.Join(dataDir, "out", string(r), strconv.FormatUint(uint64(s), 10))
}

const resultFile = "build.json"

// PlanFile is the record of the plan beside a built livepatch: what another
// builder needs to make the same bytes.
const PlanFile = "plan.json"

// Read returns the results of all finished builds of a kernel, by sequence.
func Read(dataDir string, r kernel.Release) ([]Result, error) {
	files, err := filepath.Glob(filepath.Join(dataDir, "out", string(r), "[0-9]*", resultFile))
	if err != nil {
		return nil, err
	}
	var all []Result
	for _, f := range files {
		b, err := durable.ReadFile(f, 16<<20)
		if err != nil {
			return nil, err
		}
		var res Result
		if err := json.Unmarshal(b, &res); err != nil {
			return nil, fmt.Errorf("read %s: %w", f, err)
		}
		if res.Result == Built {
			res.Module.Path = filepath.Join(filepath.Dir(f), filepath.Base(res.Module.Path))
		}
		all = append(all, res)
	}
	slices.SortFunc(all, func(a, b Result) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return all, nil
}

// Next is the sequence that a plan gets: that of the newest build if its
// inputs are the same, else one more.
func Next(done []Result, digest string) livepatch.Sequence {
	if len(done) == 0 {
		return 1
	}
	last := done[len(done)-1]
	if last.Plan == digest {
		return last.Sequence
	}
	return last.Sequence + 1
}

// Run builds a plan into its folder. The folder appears whole, with the result
// in it, or not at all; only a built livepatch has one.
func Run(ctx context.Context, b Builder, p compose.Plan, dataDir string, clock *Clock) (Result, error) {
	digest, err := p.Digest()
	if err != nil {
		return Result{}, err
	}
	final := Dir(dataDir, p.Kernel.Release, p.Sequence)
	if err := os.MkdirAll(filepath.Dir(final), 0o755); err != nil {
		return Result{}, err
	}
	dir, remove, err := Scratch(filepath.Dir(final), ".building-")
	if err != nil {
		return Result{}, err
	}
	defer remove() // nothing is there after the rename
	start := time.Now()
	res, err := b.Build(ctx, p, dir, clock)
	if err != nil {
		res.Result, res.Error, res.Hint = Broken, err.Error(), fault.HintOf(err)
	}
	clock.seconds["total"] = time.Since(start).Seconds()
	res.Version, res.Plan, res.Sequence, res.Seconds = 1, digest, p.Sequence, clock.seconds
	e := p.Kernel
	res.Kernel, res.Distro, res.Arch, res.BuildID, res.Fixes = e.Release, e.Distro, e.Arch, e.BuildID, p.Fixes()
	if res.Refusals == nil {
		res.Refusals = []Refusal{}
	}
	if res.NotBuilt == nil {
		res.NotBuilt = []string{}
	}
	if res.Unchanged == nil {
		res.Unchanged = []string{}
	}
	if res.Warnings == nil {
		res.Warnings = []Refusal{}
	}
	if res.Functions == nil {
		res.Functions = []livepatch.Function{}
	}
	if res.Result != Built {
		return res, nil
	}
	record, err := p.Encode()
	if err != nil {
		return res, err
	}
	if err := durable.WriteFile(filepath.Join(dir, PlanFile), record, 0o644); err != nil {
		return res, err
	}
	return res, keep(res, dir, final)
}

// keep moves a built livepatch into place.
func keep(res Result, dir, final string) error {
	res.Module.Path = filepath.Base(res.Module.Path)
	out, err := json.MarshalIndent(res, "", " ")
	if err != nil {
		return err
	}
	res.Module.Path = filepath.Join(final, res.Module.Path)
	if err := durable.WriteFile(filepath.Join(dir, resultFile), append(out, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	dataDir := filepath.Dir(filepath.Dir(filepath.Dir(final)))
	done, err := Read(dataDir, res.Kernel)
	if err != nil {
		return err
	}
	for _, old := range done {
		if old.Sequence == res.Sequence {
			if err := again(old, res); err != nil {
				return err
			}
			return keepPlan(dir, final)
		}
	}
	if err := os.Rename(dir, final); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(final))
}

// again compares a repeated build with the first one: the same inputs must
// have given the same bytes. The first stays; it may be tested and signed.
func again(old, res Result) error {
	if old.Module.SHA256 != res.Module.SHA256 {
		return fault.New(fault.Internal, "not_reproducible", "sequence %d was built again from the same inputs with other bytes: %s, before %s",
			res.Sequence, res.Module.SHA256, old.Module.SHA256)
	}
	return nil
}

// keepPlan puts the record of the plan beside a livepatch that was built
// before. Its digest is the same; authors and origins, which the digest does
// not cover, may have been mended since.
func keepPlan(dir, final string) error {
	b, err := durable.ReadFile(filepath.Join(dir, PlanFile), compose.MaxRecord)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(final, PlanFile), b, 0o644)
}

// Load reads one build in a folder, which may have been copied from another
// machine: the result, and the record of its plan.
func Load(dir string) (Result, compose.Plan, error) {
	var res Result
	b, err := durable.ReadFile(filepath.Join(dir, resultFile), 16<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return res, compose.Plan{}, fault.New(fault.NotFound, "no_build", "no build lies in %s: %w", dir, err).
			WithHint("name the folder of one sequence, such as out/RELEASE/1")
	}
	if err != nil {
		return res, compose.Plan{}, err
	}
	if err := json.Unmarshal(b, &res); err != nil {
		return res, compose.Plan{}, fault.New(fault.Invalid, "bad_build", "read %s: %w", filepath.Join(dir, resultFile), err)
	}
	if res.Result != Built || res.Module == nil {
		return res, compose.Plan{}, fault.New(fault.Invalid, "bad_build", "read %s: nothing was built", filepath.Join(dir, resultFile))
	}
	res.Module.Path = filepath.Join(dir, filepath.Base(res.Module.Path))
	b, err = durable.ReadFile(filepath.Join(dir, PlanFile), compose.MaxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return res, compose.Plan{}, fault.New(fault.NotFound, "no_plan", "the plan of sequence %d is not recorded: %w", res.Sequence, err).
			WithHint("build it again: klatch-forge build --kernel %s", res.Kernel)
	}
	if err != nil {
		return res, compose.Plan{}, err
	}
	plan, err := compose.ParseRecord(b)
	if err != nil {
		return res, plan, err
	}
	digest, err := plan.Digest()
	if err != nil {
		return res, plan, err
	}
	if digest != res.Plan || plan.Sequence != res.Sequence {
		return res, plan, fault.New(fault.Untrusted, "other_plan", "the recorded plan is not the one that sequence %d was built from", res.Sequence).
			WithHint("build it again: klatch-forge build --kernel %s", res.Kernel)
	}
	return res, plan, nil
}
