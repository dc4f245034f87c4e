// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"cmp"
	"errors"
	"log/slog"
	"os"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
)

// Serve answers requests, one at a time, until nobody asks for the idle time.
// The socket stays open in systemd, which starts the loader again.
func (l *Loader) Serve(on *loaderapi.Listener, idle time.Duration) error {
	for {
		c, err := on.Accept(idle)
		if errors.Is(err, loaderapi.ErrIdle) {
			return nil
		}
		if err != nil {
			return err
		}
		limit := time.AfterFunc(cmp.Or(l.Limit, loaderapi.WorkLimit), l.Overdue)
		l.handle(c)
		limit.Stop()
	}
}

func (l *Loader) handle(c *loaderapi.Conn) {
	defer c.Close() //nolint:errcheck // the answer is sent, or the peer is gone
	var a loaderapi.Answer
	r, files, err := c.Receive() // also from a stranger, who then reads the refusal
	op := slog.String("op", string(r.Op))
	if c.UID != 0 && c.UID != l.Daemon {
		err = fault.New(fault.Denied, "not_allowed", "uid %d may not ask the loader", c.UID)
	}
	if err == nil {
		a, err = l.do(r, files, c.UID)
	}
	loaderapi.CloseFiles(files)
	if err != nil {
		l.Log.Warn("request refused", op, slog.Uint64("uid", uint64(c.UID)), slog.String("code", string(fault.CodeOf(err))), slog.Any("err", err))
	}
	if err := c.Answer(a, err); err != nil {
		l.Log.Warn("answer not sent", op, slog.Any("err", err))
	}
}

// do does one request and looks at the result. A fault changes nothing but the
// journal's memory of it.
func (l *Loader) do(r loaderapi.Request, files []*os.File, uid uint32) (loaderapi.Answer, error) {
	var a loaderapi.Answer
	s, err := l.open()
	if err != nil {
		return a, err
	}
	defer s.close() //nolint:errcheck // a lock
	switch r.Op {
	case loaderapi.OpStatus:
	case loaderapi.OpLoad:
		err = s.load(files[0], files[1])
	case loaderapi.OpRecall:
		err = s.recall(files[0])
	case loaderapi.OpConfirm:
		err = s.confirm(r.Sequence)
	case loaderapi.OpCancel:
		err = s.cancel(r.Sequence)
	case loaderapi.OpBlockers:
		a.Blockers, err = s.Kernel.Blockers()
	case loaderapi.OpTracers:
		a.Tracers, err = s.Kernel.Tracers()
	case loaderapi.OpDisable:
		if uid != 0 {
			err = fault.New(fault.Denied, "not_root", "only root may disable the livepatch")
		} else {
			err = s.disable()
		}
	}
	now, lookErr := l.Kernel.Look()
	if lookErr != nil {
		return a, errors.Join(err, lookErr)
	}
	s.State = now
	a.Status = s.status()
	return a, err
}

func (s *session) status() loaderapi.Status {
	_, _ = s.anchor() // reads the recalls
	ours, foreign := s.ours()
	st := loaderapi.Status{
		Kernel:   s.Build,
		Foreign:  foreign,
		Highest:  s.record.Highest,
		Attempt:  s.record.Attempt,
		Disabled: s.journal.Disabled == s.BootID,
		Recalls:  s.recalls.Version,
		Boot:     loaderapi.BootState{Outcome: bootNotRun},
	}
	if len(ours) > 0 {
		p := s.find(ours[0])
		st.Loaded = &loaderapi.Loaded{Sequence: ours[0], Enabled: p.Enabled, Transition: p.Transition, Patched: p.Patched, Fixes: s.fixes(ours[0])}
	}
	if b := s.journal.Boot; b.BootID == s.BootID {
		st.Boot = loaderapi.BootState{Outcome: b.Outcome, Code: b.Code, Text: b.Text}
	}
	if on, err := s.exists("off"); on || err != nil {
		st.Boot.Stops = append(st.Boot.Stops, "flag")
	}
	if s.breaker() {
		st.Boot.Stops = append(st.Boot.Stops, "breaker")
	}
	return st
}

// fixes reads what the stored manifest says; nil where there is none that is
// trusted.
func (s *session) fixes(n livepatch.Sequence) []livepatch.Fix {
	f, err := s.readStored(n, ".manifest", livepatch.MaxManifest)
	if err != nil {
		return nil
	}
	defer f.Close() //nolint:errcheck // memory only
	_, m, err := s.checkManifest(f.Bytes)
	if err != nil && fault.CodeOf(err) != "recalled" || m.Sequence != n {
		return nil
	}
	return m.Fixes
}
