// SPDX-License-Identifier: Apache-2.0

// Package loader is the root side of a machine: it verifies a livepatch again,
// writes the attempt down, gives the module to the kernel, and puts the
// confirmed one back at boot. It trusts nobody: not the daemon that asks, not
// what it stored itself. It may not use a network, start a program or take a
// path from a caller.
//
// Read load first: it is the list of everything that must hold before root
// changes the kernel.
package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/klp"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/trust"
)

// Kernel is what the loader needs of a kernel. The real one is klp.Kernel; the
// contract is the suite in internal/testkit/klptest. All calls come from one
// goroutine. Load returns when the kernel has the module, Disable when the
// transition has begun; Disable and Remove are safe to repeat.
type Kernel interface {
	Look() (klp.State, error)
	Load(module *os.File) error
	Disable(name string) error
	Remove(name string) error
	Blockers() ([]loaderapi.Blocker, error)
	Tracers() (string, error)
}

// Loader does one request at a time.
type Loader struct {
	Kernel  Kernel
	State   string // folder of journal and store, 0700, only ours
	Etc     string // folder of trust.json, allow-lab-keys, off
	Daemon  uint32 // uid of klatchd; root may always ask
	Log     *slog.Logger
	Overdue func()        // called when a request passed its time limit; ends the process
	Limit   time.Duration // of one request; 0 means loaderapi.WorkLimit
}

// session is one request under the lock: what the kernel and the journal say.
type session struct {
	*Loader
	klp.State
	journal journal
	record  *record // of the running kernel build
	recalls livepatch.Recalls
	close   func() error // gives the lock up
}

func (l *Loader) open() (*session, error) {
	unlock, err := durable.Lock(filepath.Join(l.State, "lock"))
	if err != nil {
		return nil, err
	}
	s := &session{Loader: l, close: unlock}
	if s.State, err = l.Kernel.Look(); err == nil {
		err = s.readJournal()
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// ours lists our livepatches in the kernel, newest first; foreign the others.
func (s *session) ours() (ours []livepatch.Sequence, foreign []string) {
	for _, p := range s.Livepatches {
		if n, ok := livepatch.SequenceOf(p.Name); ok {
			ours = append(ours, n)
		} else {
			foreign = append(foreign, p.Name)
		}
	}
	slices.Sort(ours)
	slices.Reverse(ours)
	return ours, foreign
}

// find gives the state of our livepatch; nil where it is not in the kernel.
func (s *session) find(n livepatch.Sequence) *klp.Livepatch {
	for i := range s.Livepatches {
		if s.Livepatches[i].Name == n.ModuleName() {
			return &s.Livepatches[i]
		}
	}
	return nil
}

// load verifies a livepatch from foreign descriptors and loads it.
func (s *session) load(manifest, module *os.File) error {
	if err := s.reconcile(); err != nil {
		return err
	}
	if outcome, err := s.stopped(); err != nil {
		return err
	} else if outcome != "" {
		return fault.New(fault.Denied, fault.Code(outcome), "loading livepatches is switched off on this machine").
			WithHint("klatch status names the switch; docs/reference/loader.md says how to take it back")
	}
	signed, err := klp.Seal(manifest, livepatch.MaxManifest)
	if err != nil {
		return err
	}
	defer signed.Close() //nolint:errcheck // memory only
	anchor, m, err := s.checkManifest(signed.Bytes)
	if err != nil {
		return err
	}
	have := s.record.Highest
	if ours, _ := s.ours(); len(ours) > 0 {
		have = max(have, ours[0])
	}
	if err := livepatch.CheckReplace(have, m.Sequence); err != nil {
		return err
	}
	if n := s.record.Deaths[m.Sequence]; n >= maxDeaths {
		return fault.New(fault.Conflict, "sequence_failed", "the machine died %d times with sequence %d in flight", n, m.Sequence).
			WithHint("wait for a higher sequence, or as root: klatch-loader clear-breaker")
	}
	sealed, err := klp.Seal(module, m.Module.Bytes)
	if err != nil {
		return err
	}
	defer sealed.Close() //nolint:errcheck // memory only
	if err := s.checkModule(anchor, m, sealed); err != nil {
		return err
	}
	if err := s.store(m.Sequence, signed.Bytes, sealed.Bytes); err != nil {
		return err
	}
	return s.attempt(m.Sequence, sealed, false)
}

// checkManifest is the trust in a manifest: threshold, running kernel build, not recalled.
func (s *session) checkManifest(signed []byte) (*trust.Anchor, livepatch.Manifest, error) {
	var m livepatch.Manifest
	anchor, err := s.anchor()
	if err == nil {
		m, err = anchor.OpenManifest(signed)
	}
	if err == nil {
		err = cmp.Or(kernel.Fits(m.Kernel, s.Build), s.recalls.Check(m.Kernel.ID, m.Sequence)) // Fits asks for no distro: the kernel knows none
	}
	return anchor, m, err
}

// checkModule is the trust in a module: the signed bytes, the module
// signature, the module's own words, and a kernel that is ready for it.
func (s *session) checkModule(anchor *trust.Anchor, m livepatch.Manifest, sealed *klp.Sealed) error {
	size := int64(len(sealed.Bytes))
	switch {
	case size < m.Module.Bytes:
		return fault.New(fault.Untrusted, "module_truncated", "module has %d bytes, the manifest says %d", size, m.Module.Bytes)
	case size > m.Module.Bytes:
		return fault.New(fault.Untrusted, "module_oversize", "module has more than the %d bytes of the manifest", m.Module.Bytes)
	case sealed.SHA256 != m.Module.SHA256 || sealed.SHA512 != m.Module.SHA512:
		return fault.New(fault.Untrusted, "module_digest", "module is not the one of the manifest: its digest differs")
	}
	body, err := anchor.VerifyModule(sealed.Bytes)
	if err != nil {
		return err
	}
	if err := checkELF(body, m); err != nil {
		return err
	}
	if _, foreign := s.ours(); len(foreign) > 0 {
		return fault.New(fault.Conflict, "foreign_livepatch", "livepatch %q in the kernel is not ours; ours would replace it", foreign[0]).
			WithHint("take the other one out first, or stop using klatch on this machine")
	}
	for _, p := range s.Livepatches {
		if p.Transition {
			return fault.New(fault.Conflict, "transition_running", "the transition of %s has not finished", p.Name).
				WithHint("wait for it, or cancel it")
		}
	}
	return nil
}

func (s *session) anchor() (*trust.Anchor, error) {
	lab, err := s.exists("allow-lab-keys")
	if err != nil {
		return nil, err
	}
	b, err := durable.ReadFile(filepath.Join(s.Etc, "trust.json"), trust.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Untrusted, "no_anchor", "read trust anchor: %w", err).
			WithHint("install the publisher's anchor: klatch trust install FILE")
	}
	if err != nil {
		return nil, fmt.Errorf("read trust anchor: %w", err)
	}
	a, err := trust.ParseAnchor(b, lab)
	if err != nil {
		return nil, err
	}
	if b, err = durable.ReadFile(filepath.Join(s.Loader.State, "recalls.note"), livepatch.MaxRecalls); err == nil {
		s.recalls, err = a.OpenRecalls(b)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, livepatch.ErrForeign) { // foreign: from before this anchor
		return a, fmt.Errorf("recalls.note is damaged, so what was recalled is unknown; klatch check fetches it anew: %w", err)
	}
	a.Revoke(s.recalls)
	return a, nil
}

// recall keeps the publisher's newest recalls for every load and boot to come.
func (s *session) recall(f *os.File) error {
	anchor, err := s.anchor() // with damaged recalls an error too: these heal them
	if anchor == nil {
		return err
	}
	signed, err := klp.Seal(f, livepatch.MaxRecalls)
	if err != nil {
		return err
	}
	defer signed.Close() //nolint:errcheck // memory only
	switch r, err := anchor.OpenRecalls(signed.Bytes); {
	case err != nil:
		return err
	case !r.Holds(s.recalls): // they only grow
		return fault.New(fault.Untrusted, "recalls_rollback", "recalls %d lack some of recalls %d", r.Version, s.recalls.Version)
	}
	return durable.WriteFile(filepath.Join(s.Loader.State, "recalls.note"), signed.Bytes, 0o600)
}

// attempt writes the attempt down and loads. The attempt is on disk before the
// kernel is touched: if the machine dies now, the next boot counts it.
func (s *session) attempt(n livepatch.Sequence, sealed *klp.Sealed, atBoot bool) error {
	s.record.Attempt = &loaderapi.Attempt{Sequence: n, BootID: s.BootID, Boots: s.record.Deaths[n], AtBoot: atBoot}
	if err := s.save(); err != nil {
		return err
	}
	if err := s.Kernel.Load(sealed.File); err != nil {
		s.record.Attempt = nil
		return errors.Join(err, s.save(), s.prune())
	}
	s.Log.Info("livepatch loaded", sequence(n), slog.Bool("at_boot", atBoot))
	return nil
}

// confirm looks for itself and raises the highest confirmed sequence.
func (s *session) confirm(n livepatch.Sequence) error {
	if err := s.reconcile(); err != nil {
		return err
	}
	p, a := s.find(n), s.record.Attempt
	switch {
	case p == nil:
		return notLoaded(n)
	case !p.Enabled || p.Transition || !p.Patched:
		return fault.New(fault.Conflict, "not_done", "sequence %d is not done: enabled %t, in transition %t, all objects patched %t",
			n, p.Enabled, p.Transition, p.Patched)
	case a == nil && n == s.record.Highest:
		return nil // a repetition
	case a == nil || a.Sequence != n:
		return fault.New(fault.Conflict, "no_attempt", "sequence %d was not put in by this loader", n)
	}
	s.record.Highest, s.record.Attempt = max(s.record.Highest, n), nil
	for d := range s.record.Deaths {
		if d <= n {
			delete(s.record.Deaths, d)
		}
	}
	if err := s.save(); err != nil {
		return err
	}
	s.Log.Info("livepatch confirmed", sequence(n))
	return s.prune()
}

// cancel reverses the transition of a livepatch that has not finished.
func (s *session) cancel(n livepatch.Sequence) error {
	if err := s.reconcile(); err != nil {
		return err
	}
	p := s.find(n)
	switch {
	case p == nil:
		return notLoaded(n)
	case !p.Transition:
		return fault.New(fault.Conflict, "not_running", "sequence %d has finished its transition", n).
			WithHint("a finished livepatch is superseded by a higher sequence")
	}
	if err := s.takeOut(n, 5*time.Second); fault.CodeOf(err) != "still_moving" {
		return err
	}
	return nil // reversed, and the status shows that it still runs
}

// disable takes our livepatches out until the next reboot. The mark comes
// first: a daemon that asks to load meanwhile is refused.
func (s *session) disable() error {
	if err := s.reconcile(); err != nil {
		return err
	}
	s.journal.Disabled = s.BootID
	if err := s.save(); err != nil {
		return err
	}
	s.Log.Warn("livepatches disabled by root until the next reboot")
	ours, _ := s.ours()
	for _, n := range ours {
		if err := s.takeOut(n, 20*time.Second); err != nil { // the kernel wakes sleepers after 15 s
			return err
		}
	}
	return nil
}

// takeOut disables one livepatch and waits until its folder is gone.
func (s *session) takeOut(n livepatch.Sequence, limit time.Duration) error {
	if err := s.Kernel.Disable(n.ModuleName()); err != nil {
		return err
	}
	for until := time.Now().Add(limit); ; <-time.After(100 * time.Millisecond) {
		var err error
		if s.State, err = s.Kernel.Look(); err != nil {
			return err
		}
		if s.find(n) == nil {
			return s.reconcile()
		}
		if time.Now().After(until) {
			return fault.New(fault.Unavailable, "still_moving", "sequence %d is on its way out, but some tasks still use it", n).
				WithHint("klatch blockers lists them; then repeat")
		}
	}
}

func sequence(n livepatch.Sequence) slog.Attr { return slog.Uint64("sequence", uint64(n)) }

func notLoaded(n livepatch.Sequence) error {
	return fault.New(fault.NotFound, "not_loaded", "sequence %d is not in the kernel", n)
}
