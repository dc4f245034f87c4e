// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/lab/story"
	"klatch/lab/scenarios"
)

// plan is one story for this livepatch, or why it does not need it.
type plan struct {
	player.Play
	name     string
	source   string // name of the story, before "each:" made several of it
	required bool
	lacks    string // not applicable, and why
	inputs   Inputs
	digest   string
}

// run names the folder of a run, and what --replay takes.
func (p plan) run() string {
	return strings.ReplaceAll(p.name, "/", "_") + "-" + p.digest[:12]
}

// Ours are the stories that every livepatch goes through.
func Ours() ([]Source, error) {
	files, err := scenarios.Files.ReadDir(".")
	if err != nil {
		return nil, err
	}
	var out []Source
	for _, f := range files {
		text, err := scenarios.Files.ReadFile(f.Name())
		if err != nil {
			return nil, err
		}
		s, err := story.Parse("lab/scenarios/"+f.Name(), text, player.Grammar())
		if err != nil {
			return nil, err
		}
		out = append(out, Source{Story: s})
	}
	return out, nil
}

// Planned is a story as --list shows it.
type Planned struct {
	Name          string `json:"name"`
	Proves        string `json:"proves"`
	Required      bool   `json:"required"`
	NotApplicable string `json:"not_applicable,omitempty"` // why
	Kept          string `json:"kept,omitempty"`           // verdict of a run with the same inputs
}

// List says which stories there are for the livepatch of a trial.
func List(ctx context.Context, t Trial) ([]Planned, error) {
	plans, err := t.plan(ctx)
	if err != nil {
		return nil, err
	}
	out := []Planned{}
	for _, p := range plans {
		l := Planned{Name: p.name, Proves: p.Story.Proves, Required: p.required, NotApplicable: p.lacks}
		if s, ok := (store{t.Dir}).kept(p); ok && t.Dir != "" {
			l.Kept = string(s.Verdict)
		}
		out = append(out, l)
	}
	return out, nil
}

// plan lists all stories, ours first, with their digests.
func (t Trial) plan(ctx context.Context) ([]plan, error) {
	ours, err := Ours()
	if err != nil {
		return nil, err
	}
	rig := Rig{About: lab.Describe(t.Rig)}
	if rig.Digest, err = lab.Identity(ctx, t.Rig); err != nil {
		return nil, err
	}
	subject := player.Subject{Built: t.Built, Earlier: t.Earlier, Tables: t.Tables, Checks: t.Checks}
	hashes := hasher{}
	var plans []plan
	for _, src := range append(ours, t.Own...) {
		one := player.Play{Subject: subject, Story: src.Story, Taken: src.Taken, CPUs: t.CPUs, Busy: cmp.Or(t.Busy, player.DefaultBusy)}
		p := plan{Play: one, name: src.name(), source: src.name(), required: src.Story.Required && !src.alone}
		if src.Story.Each == story.EachEarlier {
			if len(t.Earlier) == 0 {
				if p.lacks, err = p.Lacks("earlier"); err != nil {
					return nil, err
				}
				plans = append(plans, p)
			}
			for i, e := range t.Earlier {
				each := p
				each.name += fmt.Sprintf("-sequence-%d", e.Sequence)
				each.Over = &t.Earlier[i]
				plans = append(plans, each)
			}
			continue
		}
		plans = append(plans, p)
	}
	for i := range plans {
		p := &plans[i]
		for _, need := range p.Story.Needs {
			lacks, err := p.Lacks(need)
			if err != nil {
				return nil, fmt.Errorf("story %s: %w", p.name, err)
			}
			p.lacks = cmp.Or(p.lacks, lacks)
		}
		if p.inputs, err = t.inputs(*p, rig, hashes); err != nil {
			return nil, err
		}
		if p.digest, err = p.inputs.digest(); err != nil {
			return nil, err
		}
	}
	return plans, nil
}

// choose takes the named stories, or all that are required.
func choose(plans []plan, only []string) ([]plan, error) {
	if len(only) == 0 {
		return slices.DeleteFunc(slices.Clone(plans), func(p plan) bool { return p.lacks != "" || !p.required }), nil
	}
	chosen := map[string]plan{}
	for _, name := range only {
		found := slices.DeleteFunc(slices.Clone(plans), func(p plan) bool {
			return name != p.name && name != p.source && name != p.Story.Name
		})
		if len(found) == 0 {
			return nil, fault.New(fault.NotFound, "no_story", "there is no story %q", name).WithHint("klatch-forge test --list shows all")
		}
		for _, p := range found {
			if p.lacks != "" {
				return nil, fault.New(fault.Invalid, "not_applicable", "story %s is not applicable: %s", p.name, p.lacks)
			}
			chosen[p.name] = p
		}
	}
	var out []plan
	for _, name := range slices.Sorted(maps.Keys(chosen)) {
		out = append(out, chosen[name])
	}
	return out, nil
}
