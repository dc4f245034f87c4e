// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/livepatch"
)

// Inputs are everything that the outcome of one story may depend on. They are
// on disk before it is played.
type Inputs struct {
	Version  int                `json:"version"`
	Player   int                `json:"player"` // player.Version
	Name     string             `json:"name"`
	Story    string             `json:"story"` // SHA-256 of its text
	Rig      Rig                `json:"rig"`
	Kernel   Input              `json:"kernel"` // image
	BuildID  string             `json:"build_id"`
	Sequence livepatch.Sequence `json:"sequence"`
	Module   Input              `json:"module"`
	Over     livepatch.Sequence `json:"over,omitempty"`
	Earlier  []Input            `json:"earlier"`
	Symbols  Input              `json:"symbols"`
	Modules  []Input            `json:"modules"` // that the livepatch reaches
	Checks   []Input            `json:"checks"`
	Taken    []Input            `json:"taken"`
	CPUs     int                `json:"cpus"`
	Busy     time.Duration      `json:"busy"`

	// Not part of the digest.
	Started time.Time `json:"started,omitzero"`
}

// Rig is what a story was played on.
type Rig struct {
	lab.About
	Digest string `json:"digest,omitempty"` // lab.Identity
}

// name is that of the board, or "virtual".
func (r Rig) name() string { return cmp.Or(r.Name, r.Kind) }

// Input is one file.
type Input struct {
	Name   string `json:"name,omitempty"` // in the guest, a fix, or a sequence
	SHA256 string `json:"sha256,omitempty"`
	Mode   uint32 `json:"mode,omitempty"`
	Path   string `json:"path,omitempty"` // where it was; not part of the digest
}

const inputsVersion = 1

// hasher remembers the digests of files.
type hasher map[string]string

// maxInput is more than any file that a trial reads.
const maxInput = 2 << 30

func (h hasher) file(path string) (string, error) {
	if sum, ok := h[path]; ok {
		return sum, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(f, maxInput)); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	h[path] = hex.EncodeToString(sum.Sum(nil))
	return h[path], nil
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// inputs collects what a plan depends on. A story of which something is
// missing, such as the kernel's image, fails when it is played, not here.
func (t Trial) inputs(p plan, rig Rig, h hasher) (Inputs, error) {
	in := Inputs{Version: inputsVersion, Player: player.Version, Name: p.name, Story: digestOf(p.Story.Text), Rig: rig,
		BuildID: t.Built.BuildID.String(), Sequence: t.Built.Sequence, CPUs: t.CPUs, Busy: p.Busy,
		Module: Input{SHA256: t.Built.Module.SHA256, Path: t.Built.Module.Path}}
	if p.Over != nil {
		in.Over = p.Over.Sequence
	}
	for _, b := range append([]build.Result{t.Built}, t.Earlier...) {
		sum, err := h.file(b.Module.Path)
		if err != nil && !os.IsNotExist(err) {
			return in, err
		}
		if err == nil && sum != b.Module.SHA256 {
			return in, fault.New(fault.Conflict, "module_digest", "%s is not what build.json says", b.Module.Path).WithHint("klatch-forge build --kernel %s", b.Kernel)
		}
	}
	for _, e := range t.Earlier {
		in.Earlier = append(in.Earlier, Input{Name: e.Sequence.ModuleName(), SHA256: e.Module.SHA256, Path: e.Module.Path})
	}
	add := func(name, path string, mode uint32) (Input, error) {
		if path == "" {
			return Input{}, nil
		}
		sum, err := h.file(path)
		if os.IsNotExist(err) {
			sum, err = "", nil
		}
		return Input{name, sum, mode, path}, err
	}
	var err error
	if in.Kernel, err = add("", t.Kernel, 0); err != nil {
		return in, err
	}
	if in.Symbols, err = add("", t.Tables.Vmlinux, 0); err != nil {
		return in, err
	}
	reached, err := p.Reached()
	if err != nil {
		return in, err
	}
	for _, m := range reached {
		i, err := add(m, t.Tables.Module(m), 0)
		if err != nil {
			return in, err
		}
		in.Modules = append(in.Modules, i)
	}
	for _, id := range t.Built.Fixes {
		if program := t.Checks[id]; program != nil {
			in.Checks = append(in.Checks, Input{Name: string(id), SHA256: digestOf(program)})
		}
	}
	for _, f := range p.Taken {
		i, err := add(f.Name, f.Source, uint32(f.Mode))
		if err != nil {
			return in, err
		}
		in.Taken = append(in.Taken, i)
	}
	return in, nil
}

// digest is of everything but paths and times.
func (in Inputs) digest() (string, error) {
	in.Started = time.Time{}
	for _, one := range []*Input{&in.Kernel, &in.Module, &in.Symbols} {
		one.Path = ""
	}
	for _, list := range []*[]Input{&in.Earlier, &in.Modules, &in.Checks, &in.Taken} {
		*list = slices.Clone(*list)
		for i := range *list {
			(*list)[i].Path = ""
		}
	}
	b, err := json.Marshal(in)
	return digestOf(b), err
}

// earlierOf finds the builds that a run was played over.
func earlierOf(in Inputs, all []build.Result) (earlier []build.Result, over *build.Result) {
	for _, b := range all {
		if !slices.ContainsFunc(in.Earlier, func(i Input) bool { return i.Name == b.Sequence.ModuleName() }) {
			continue
		}
		earlier = append(earlier, b)
	}
	for i := range earlier {
		if earlier[i].Sequence == in.Over {
			over = &earlier[i]
		}
	}
	return earlier, over
}
