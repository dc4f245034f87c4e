// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/notice"
	"klatch/internal/wire"
)

// told is what the publisher told of a kernel build. It is on disk in the form
// in which it was signed, before it is used.
type told struct {
	n   *notice.Notice
	err error // why a newer one could not be had
}

const noticeFile = "notice.json"

// keptNotice reads what an earlier run kept. What cannot be read is as good as
// absent: the next check brings it again.
func keptNotice(cfg Config) told {
	b, err := durable.ReadFile(filepath.Join(cfg.Dir, noticeFile), notice.MaxBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return told{}
	}
	var n notice.Notice
	if err == nil {
		n, err = notice.Parse(b)
	}
	if err != nil {
		cfg.Log.LogAttrs(context.Background(), slog.LevelWarn, "kept notice not read", slog.String("err", err.Error()))
		return told{}
	}
	return told{n: &n}
}

// on is the notice on a kernel build, nil if there is none. After a boot into
// another kernel the one that was kept says nothing.
func (t told) on(running kernel.Build) *notice.Notice {
	if t.n == nil || t.n.Fits(running) != nil {
		return nil
	}
	return t.n
}

// takeNotice brings what is told of the running kernel build up to date. Of one
// that is refused, or cannot be had, the one before stays. A mirror that does
// not have it is no failed check: livepatches do not hang on it.
func (a *Agent) takeNotice(ctx context.Context, s Snapshot, running kernel.Build) error {
	b, err := s.Fetch(ctx, notice.TargetPath(running), notice.MaxBytes)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		if err := durable.Remove(filepath.Join(a.cfg.Dir, noticeFile)); err != nil {
			return err
		}
		a.tellNotice(told{})
		return nil
	case fault.KindOf(err) == fault.Unavailable:
		a.log.LogAttrs(ctx, slog.LevelWarn, "notice not fetched", slog.String("err", err.Error()))
		a.noNewNotice(fmt.Errorf("what the publisher says of this kernel could not be fetched: %w", err))
		return nil
	}
	var n notice.Notice
	if err == nil {
		n, err = notice.Parse(b)
	}
	if err == nil {
		err = n.Fits(running)
	}
	if err != nil {
		a.noNewNotice(err)
		return err
	}
	if err := durable.WriteFile(filepath.Join(a.cfg.Dir, noticeFile), b, 0o600); err != nil {
		return err
	}
	a.tellNotice(told{n: &n})
	return nil
}

func (a *Agent) tellNotice(t told) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.told = t
}

func (a *Agent) noNewNotice(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.told.err = err
}

// Notice is what klatch status tells of the publisher's notice.
type Notice struct {
	Support notice.State   `json:"support"`
	Text    string         `json:"text"` // of support, for a person
	Until   string         `json:"until,omitempty"`
	Ended   string         `json:"ended,omitempty"`
	Through kernel.Release `json:"through,omitempty"` // newest kernel that was declared dead with this one
	Reason  string         `json:"reason,omitempty"`
	Instead kernel.Release `json:"instead,omitempty"`
	CVEs    []notice.CVE   `json:"cves"` // that no livepatch fixes on this kernel build
}

func (in inputs) longNotice() *Notice {
	if in.notice == nil {
		return nil
	}
	s := in.notice.Support
	return &Notice{
		Support: in.support(), Text: s.Text(in.now), Until: s.Until, Ended: s.Ended, Through: s.Through,
		Reason: s.Reason, Instead: s.Instead, CVEs: append([]notice.CVE{}, in.notice.CVEs...),
	}
}

// shortNotice is what the server is told.
func (in inputs) shortNotice() *wire.Notice {
	if in.notice == nil {
		return nil
	}
	s, reboots := in.notice.Support, in.notice.Reboots()
	w := &wire.Notice{Support: string(in.support()), Until: s.Until, Ended: s.Ended, Instead: s.Instead, Reboots: len(reboots)}
	for _, c := range reboots[:min(len(reboots), wire.MaxNoticeCVEs)] {
		w.CVEs = append(w.CVEs, c.ID)
	}
	return w
}

func (in inputs) support() notice.State {
	if in.notice == nil {
		return notice.Unknown
	}
	state, _, err := in.notice.Support.At(in.now)
	if err != nil {
		return notice.Unknown
	}
	return state
}

func (in inputs) ended() bool { return in.support() == notice.Ended }

// endedText is the state of a machine whose kernel build has ended.
func (in inputs) endedText() (word string, reason fault.Code, text, next string) {
	s := in.notice.Support
	reason = "support_ended"
	if s.Ended != "" {
		reason = "declared_dead"
	}
	next = "update the kernel and reboot"
	if s.Instead != "" {
		next = fmt.Sprintf("update the kernel to %s or newer and reboot", s.Instead)
	}
	text = fmt.Sprintf("kernel upgrade required: support of %s %s", in.notice.Kernel.Release, s.Text(in.now))
	return "kernel_ended", reason, text, next
}
