// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
)

const (
	maxJournal = 1 << 20 // a few hundred bytes for each kernel build ever run
	maxDeaths  = 2       // boots that may die with one sequence in flight
)

// journal is the loader's own memory. Whoever deletes it must be root, and
// what the kernel has loaded still counts.
type journal struct {
	Version  int                        `json:"version"`
	Builds   map[kernel.BuildID]*record `json:"builds"`
	Boot     boot                       `json:"boot"`     // the last one
	Disabled string                     `json:"disabled"` // boot id in which root said no
}

// record is the memory of one kernel build.
type record struct {
	Highest livepatch.Sequence         `json:"highest"` // highest ever confirmed; never sinks
	Attempt *loaderapi.Attempt         `json:"attempt"` // in flight
	Deaths  map[livepatch.Sequence]int `json:"deaths"`  // times that the machine died with it in flight
}

type boot struct {
	BootID  string     `json:"boot_id"`
	Outcome string     `json:"outcome"`
	Code    fault.Code `json:"code"`
	Text    string     `json:"text"`
}

func (s *session) journalPath() string { return filepath.Join(s.Loader.State, "journal.json") }

func (s *session) readJournal() error {
	b, err := durable.ReadFile(s.journalPath(), maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		b, err = []byte(`{"version":1,"builds":{}}`), nil
	}
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		err = d.Decode(&s.journal)
	}
	if err == nil && (s.journal.Version != 1 || s.journal.Builds == nil) {
		err = fmt.Errorf("version %d, want 1, with builds", s.journal.Version)
	}
	for id, r := range s.journal.Builds {
		if r == nil {
			err = fmt.Errorf("build %s is null", id)
		}
	}
	if err != nil {
		return fault.New(fault.Internal, "journal_malformed", "read the loader's journal: %w", err).
			WithHint("look at %s; without it the loader does nothing", s.journalPath())
	}
	if s.record = s.journal.Builds[s.Build.ID]; s.record == nil {
		s.record = &record{}
	}
	if s.record.Deaths == nil {
		s.record.Deaths = map[livepatch.Sequence]int{}
	}
	s.journal.Builds[s.Build.ID] = s.record
	return nil
}

func (s *session) save() error {
	b, err := json.MarshalIndent(s.journal, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(s.journalPath(), append(b, '\n'), 0o600)
}

// reconcile brings the journal up to what happened since it was written: the
// machine died, or the attempt never reached the kernel or left it again.
func (s *session) reconcile() error {
	a := s.record.Attempt
	switch {
	case a == nil:
		return s.prune()
	case a.BootID != s.BootID:
		s.record.Deaths[a.Sequence]++
		s.Log.Warn("the machine went down with an attempt in flight", sequence(a.Sequence), slog.Int("boots", s.record.Deaths[a.Sequence]))
	case s.find(a.Sequence) != nil:
		return s.prune()
	}
	s.record.Attempt = nil
	return errors.Join(s.save(), s.prune())
}

// storePath names a stored file of the running kernel build.
func (s *session) storePath(n livepatch.Sequence, suffix string) string {
	return filepath.Join(s.Loader.State, s.Build.ID.String(), fmt.Sprintf("%d%s", n, suffix))
}

// store keeps a verified livepatch, so that boot needs nobody. Until the
// journal names it, prune takes it for a left-over.
func (s *session) store(n livepatch.Sequence, manifest, module []byte) error {
	dir := filepath.Dir(s.storePath(n, ""))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return errors.Join(
		durable.SyncDir(s.Loader.State),
		durable.WriteFile(s.storePath(n, ".ko"), module, 0o600),
		durable.WriteFile(s.storePath(n, ".manifest"), manifest, 0o600))
}

// prune removes what nobody needs: stored livepatches that are neither
// confirmed nor in flight, files of a write that was cut off, and modules of
// ours that the kernel has superseded.
func (s *session) prune() error {
	keep := []livepatch.Sequence{s.record.Highest}
	if a := s.record.Attempt; a != nil {
		keep = append(keep, a.Sequence)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(s.storePath(0, "")), "*"))
	for _, f := range files {
		kept := func(n livepatch.Sequence) bool { return f == s.storePath(n, ".ko") || f == s.storePath(n, ".manifest") }
		if !slices.ContainsFunc(keep, kept) {
			err = errors.Join(err, durable.Remove(f))
		}
	}
	for _, name := range s.Modules {
		if n, ours := livepatch.SequenceOf(name); ours && s.find(n) == nil {
			err = errors.Join(err, s.Kernel.Remove(name))
		}
	}
	return errors.Join(err, durable.RemoveTemp(s.Loader.State))
}
