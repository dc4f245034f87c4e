// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"path"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/translog"
	"klatch/internal/trust"
)

// logMemory is what this machine has seen of the publisher's transparency log:
// the largest checkpoint of each log, and two that contradict each other, if
// it ever saw such. It is a file of its own, so that a person can keep it as
// evidence and take it away. Written down in docs/reference/log.md.
type logMemory struct {
	Format string            `json:"format"`
	Seen   map[string]string `json:"seen"` // checkpoint, a signed note, by the log's verifier key
	Halt   *Halt             `json:"halt"`
}

const (
	logMemoryFormat = "klatch-log-memory/1"
	logMemoryFile   = "log.json"
	maxLogMemory    = 4 << 20
	logHaltHint     = "keep a copy of %s and tell the publisher by another way; when it is clear what happened, as root: klatch resume (docs/howto/log-halted.md)"
)

func (a *Agent) logMemoryPath() string { return filepath.Join(a.cfg.Dir, logMemoryFile) }

func (a *Agent) readLogMemory() (logMemory, error) {
	m := logMemory{Format: logMemoryFormat, Seen: map[string]string{}}
	b, err := durable.ReadFile(a.logMemoryPath(), maxLogMemory)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	var got logMemory
	if err := json.Unmarshal(b, &got); err != nil || got.Format != logMemoryFormat {
		return m, fault.New(fault.Internal, "state_malformed", "read %s: not what was written there: %w", a.logMemoryPath(), err).
			WithHint("keep a copy and remove the file: the next checkpoint of the log is then believed as the first one was")
	}
	if got.Seen == nil {
		got.Seen = m.Seen
	}
	return got, nil
}

func (a *Agent) writeLogMemory(m logMemory) error {
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(a.logMemoryPath(), append(b, '\n'), 0o600)
}

// trusted reads the anchor and the log policy in it; the policy is nil where
// the publisher keeps no log.
func (a *Agent) trusted() (*trust.Anchor, *translog.Policy, error) {
	anchor, err := a.cfg.Anchor()
	if err != nil {
		return nil, nil, err
	}
	policy, err := translog.Require(anchor.LogPolicy, string(anchor.Profile))
	return anchor, policy, err
}

// logHalted is the halt of a log that the owner of this machine still believes.
func (a *Agent) logHalted(policy *translog.Policy) (*Halt, error) {
	if policy == nil {
		return nil, nil
	}
	m, err := a.readLogMemory()
	if err != nil || m.Halt == nil {
		return nil, err
	}
	for _, l := range policy.Logs {
		if l.String() == m.Halt.Log {
			return m.Halt, nil
		}
	}
	return nil, nil
}

// checkLog says whether a bundle is in the publisher's log, and whether that
// log still is the one that this machine has seen before. What was seen is on
// disk before anything is made of it.
func (t *trial) checkLog(ctx context.Context) error {
	if t.policy == nil {
		return nil
	}
	m, err := t.readLogMemory()
	if err != nil {
		return err
	}
	t.proof, err = t.snapshot.Fetch(ctx, translog.ProofPath(t.offer.Target), translog.MaxProof)
	if fault.KindOf(err) == fault.NotFound {
		return fault.New(fault.Untrusted, translog.CodeNoProof, "nothing shows that %.200q was logged", t.offer.Target).
			WithHint("tell the publisher: this machine's trust anchor asks for a log proof beside every livepatch")
	}
	if err != nil {
		return stays(err)
	}
	shown, err := t.policy.Verify(t.proof, translog.EntryOf(t.offer.Target, t.raw))
	if err != nil {
		return err
	}
	if err := t.raiseFloor(t.start, t.policy.CosignedAt(shown.Signed), "cosignature"); err != nil {
		return err
	}
	log := shown.Log.String()
	seen, err := t.policy.OpenUnwitnessed([]byte(m.Seen[log]))
	if m.Seen[log] != "" && err != nil {
		return fault.New(fault.Internal, "state_malformed", "read %s: %w", t.logMemoryPath(), err).
			WithHint("keep a copy and remove the file: the next checkpoint of the log is then believed as the first one was")
	}
	if m.Seen[log] != "" {
		if err := t.compareLog(ctx, m, seen, shown); err != nil {
			return stays(err)
		}
	}
	if m.Seen[log] != "" && shown.Size <= seen.Size {
		return nil
	}
	m.Seen[log] = string(shown.Signed)
	if err := t.writeLogMemory(m); err != nil {
		return err
	}
	return t.sawCheckpoint(shown)
}

// compareLog compares two checkpoints of one log. Where their sizes differ the
// log's own newest one, and its tiles, show whether they are of one history.
// These files come from whoever serves them, so what is wrong with them says
// nothing against the livepatch.
func (t *trial) compareLog(ctx context.Context, m logMemory, seen, shown translog.Checkpoint) error {
	head := shown
	read := func(ctx context.Context, name string, limit int64) ([]byte, error) {
		return t.snapshot.Static(ctx, path.Join(translog.Folder(shown.Log), name), limit)
	}
	if shown.Size != seen.Size {
		signed, err := read(ctx, translog.CheckpointFile, translog.MaxCheckpoint)
		if err != nil {
			return noLogFiles(err)
		}
		if head, err = t.policy.OpenUnwitnessed(signed); err != nil {
			return err
		}
	}
	for _, old := range []translog.Checkpoint{seen, shown} {
		err := translog.Extends(ctx, read, head, old)
		if fault.CodeOf(err) == translog.CodeInconsistent {
			return t.logHalt(m, head, old, err)
		}
		if err != nil {
			return noLogFiles(err)
		}
	}
	return nil
}

// noLogFiles makes "later" of a file that a server does not have: its copy of
// the log may be older than that of the livepatches.
func noLogFiles(err error) error {
	if fault.KindOf(err) != fault.NotFound {
		return err
	}
	return fault.New(fault.Unavailable, "log_unavailable", "compare the log with what was seen of it: %w", err).
		WithHint("the server must also hand out the folder log/ of the publisher's repository; it is tried again later")
}

// logHalt writes down both checkpoints before it says anything.
func (a *Agent) logHalt(m logMemory, head, old translog.Checkpoint, cause error) error {
	m.Halt = &Halt{At: time.Now().UTC(), Step: StepLog, Code: translog.CodeInconsistent, Log: head.Log.String(), Text: cause.Error(), Seen: string(old.Signed), Shown: string(head.Signed)}
	if err := a.writeLogMemory(m); err != nil {
		return errors.Join(cause, err)
	}
	a.mu.Lock()
	a.seen.Halt = m.Halt
	a.mu.Unlock()
	a.log.LogAttrs(context.Background(), slog.LevelError, "log has two histories", slog.String("log", head.Origin))
	return a.haltError(m.Halt)
}
