// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/klp"
)

// The outcomes of a boot. Stored and sent: never rename one.
const (
	bootLoaded    = "loaded"
	bootNothing   = "nothing_stored"
	bootWrong     = "wrong_build" // something is stored, for other kernel builds
	bootParameter = "off_parameter"
	bootFlag      = "off_flag"
	bootDisabled  = "off_disabled" // root disabled it in this same boot
	bootBreaker   = "off_breaker"
	bootFailed    = "failed"
	bootNotRun    = "not_run"
)

// Boot puts the confirmed livepatch of the running kernel build in, if nothing
// stops it, and writes the outcome down. It needs no daemon and no network.
// Only an outcome of "failed" is an error. Safe to repeat.
func (l *Loader) Boot() (outcome string, err error) {
	s, err := l.open()
	if err != nil {
		return bootFailed, err
	}
	defer s.close() //nolint:errcheck // a lock
	if err = s.reconcile(); err == nil {
		outcome, err = s.boot()
	}
	b := boot{BootID: s.BootID, Outcome: outcome}
	if err != nil {
		b.Outcome, b.Code, b.Text = bootFailed, fault.CodeOf(err), err.Error()
	}
	s.journal.Boot = b
	s.Log.Info("boot", slog.String("outcome", b.Outcome), sequence(s.record.Highest))
	return b.Outcome, errors.Join(err, s.save())
}

func (s *session) boot() (string, error) {
	n := s.record.Highest
	if ours, _ := s.ours(); len(ours) > 0 {
		return bootLoaded, nil // a repetition
	}
	if outcome, err := s.stopped(); outcome != "" || err != nil {
		return outcome, err
	}
	if n == 0 {
		for _, r := range s.journal.Builds {
			if r.Highest > 0 {
				return bootWrong, nil
			}
		}
		return bootNothing, nil
	}
	if s.breaker() {
		return bootBreaker, nil
	}
	manifest, err := s.readStored(n, ".manifest", livepatch.MaxManifest)
	if err != nil {
		return bootFailed, err
	}
	defer manifest.Close() //nolint:errcheck // memory only
	anchor, m, err := s.checkManifest(manifest.Bytes)
	if err != nil {
		return bootFailed, err
	}
	if m.Sequence != n {
		return bootFailed, fault.New(fault.Untrusted, "store_mixed", "stored manifest of sequence %d says %d", n, m.Sequence)
	}
	module, err := s.readStored(n, ".ko", m.Module.Bytes)
	if err != nil {
		return bootFailed, err
	}
	defer module.Close() //nolint:errcheck // memory only
	if err := s.checkModule(anchor, m, module); err != nil {
		return bootFailed, err
	}
	return bootLoaded, s.attempt(n, module, true)
}

func (s *session) readStored(n livepatch.Sequence, suffix string, limit int64) (*klp.Sealed, error) {
	f, err := os.OpenFile(s.storePath(n, suffix), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fault.New(fault.Internal, "store_missing", "read the stored livepatch: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	return klp.Seal(f, limit)
}

// stopped tells which switch forbids loading on this machine, in the order of
// docs/reference/loader.md; "" for none.
func (s *session) stopped() (string, error) {
	if slices.Contains(s.CommandLine, "klatch=off") {
		return bootParameter, nil
	}
	if flag, err := s.exists("off"); flag || err != nil {
		return bootFlag, err
	}
	if s.journal.Disabled == s.BootID {
		return bootDisabled, nil
	}
	return "", nil
}

// breaker tells that loading at boot has stopped: the confirmed livepatch was
// put in at boot and the machine died, too often.
func (s *session) breaker() bool { return s.record.Deaths[s.record.Highest] >= maxDeaths }

// exists looks for a flag file; one of any kind counts.
func (s *session) exists(name string) (bool, error) {
	_, err := os.Lstat(filepath.Join(s.Etc, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for the flag: %w", err)
	}
	return true, nil
}

// ClearBreaker forgets in which attempts the machine died.
func (l *Loader) ClearBreaker() error {
	s, err := l.open()
	if err != nil {
		return err
	}
	defer s.close() //nolint:errcheck // a lock
	if err := s.reconcile(); err != nil {
		return err
	}
	for _, r := range s.journal.Builds {
		r.Deaths = nil
	}
	return s.save()
}
