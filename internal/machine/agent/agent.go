// SPDX-License-Identifier: Apache-2.0

// Package agent takes one machine from "a fix exists" to "the fix runs".
//
// Read Step first: it is the whole journey, one phase per line. Every phase is
// written to the journal before its effect, so the daemon may die at any point
// and Step goes on where the journal says. It runs without privileges: what
// needs root is asked of the loader, which verifies everything again.
//
// A failed verification never unloads what works: on every error the machine
// stays as it is.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"klatch/internal/durable"
	"klatch/internal/livepatch"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/rollout"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

// Server is the fleet's server as the agent needs it. Safe for concurrent
// use. An error of kind Unavailable means "later"; NotFound with code
// "not_enrolled" means that this machine has no credential yet.
type Server interface {
	// Identity is who this machine is there; ok is false without enrollment.
	Identity() (id Identity, ok bool)
	// Enroll exchanges a token. On return the credential is on disk.
	Enroll(ctx context.Context, address string, token wire.Token, f wire.Facts) (Identity, error)
	Check(ctx context.Context, r wire.CheckRequest) (wire.CheckAnswer, error)
	// Report returns when the server has the report for good.
	Report(ctx context.Context, r wire.Report) error
}

// Identity is an enrollment without its secrets.
type Identity struct {
	MachineID string    `json:"machine_id"`
	Tier      string    `json:"tier"`
	Server    string    `json:"server"` // address
	Expires   time.Time `json:"expires"`
}

// Repository is the publisher's signed metadata, from wherever it is served.
type Repository interface {
	// Refresh verifies the newest metadata at the time now. Untrusted means
	// that a signature, an expiry or a version was refused.
	Refresh(ctx context.Context, anchor *trust.Anchor, now time.Time) (Snapshot, error)
}

// Snapshot is one verified state of the repository.
type Snapshot interface {
	// Fetch gets the bytes of a signed target. NotFound means that the target
	// is not in the signed list, Untrusted that the bytes are not those signed.
	Fetch(ctx context.Context, target string, limit int64) ([]byte, error)
	// Static gets a file that the metadata does not name, as those of the
	// transparency log; nothing about it is verified. NotFound means that the
	// server does not have it.
	Static(ctx context.Context, name string, limit int64) ([]byte, error)
	// Recalls names the newest signed recalls; "" where there are none.
	Recalls() string
	// EvidencePolicy names the newest evidence policy of the top list; "" where
	// there is none.
	EvidencePolicy() string
	// Beside lists the signed targets in the folder of one of them.
	Beside(target string) []string
	// Named is a target by the signed list. NotFound means that the list does
	// not name it.
	Named(target string) (Listed, error)
	// Metadata says which state this is; signed is zero where it does not say.
	Metadata() (v wire.Versions, signed time.Time)
}

// Listed is a target by the signed list that names it.
type Listed struct {
	rollout.Target
	Until time.Time // when that list expires; zero: not known
}

// Rollout is the operator's signed metadata, from wherever it is served.
type Rollout interface {
	// Refresh verifies the newest metadata at the time now, as Repository does.
	Refresh(ctx context.Context, anchor *rollout.Anchor, now time.Time) (RolloutSnapshot, error)
}

// RolloutSnapshot is one verified state of it.
type RolloutSnapshot interface {
	// Read gets a signed file and the role that named it. NotFound means that
	// no list names it.
	Read(ctx context.Context, path string, limit int64) (rollout.File, error)
	Metadata() (v wire.Versions, signed time.Time)
}

// Loader is the root program; loaderapi.Client is one.
type Loader interface {
	Load(ctx context.Context, manifest, module *os.File) (loaderapi.Status, error)
	Status(ctx context.Context) (loaderapi.Status, error)
	Confirm(ctx context.Context, s livepatch.Sequence) (loaderapi.Status, error)
	Cancel(ctx context.Context, s livepatch.Sequence) (loaderapi.Status, error)
	Recall(ctx context.Context, recalls *os.File) (loaderapi.Status, error)
	Blockers(ctx context.Context) ([]loaderapi.Blocker, error)
	// Tracers is what package tracer reads.
	Tracers(ctx context.Context) (string, error)
}

// Config is what an agent is made of.
type Config struct {
	Dir     string // state, owned by klatchd alone
	Version string
	Built   time.Time // of this program: the clock is never before it; zero: not known
	Policy  Policy

	Machine    facts.Machine
	Server     Server
	Repository Repository
	Loader     Loader
	// Anchor reads the trust anchor anew each time, so that installing one
	// needs no restart. NotFound with code "no_anchor" means none is there.
	Anchor func() (*trust.Anchor, error)
	// Rollout is the operator's repository, and Operator reads the operator's
	// anchor anew each time; nil without an error means that none is installed,
	// and then the server chooses. Tier is this machine's, by its own
	// configuration.
	Rollout  Rollout
	Operator func() (*rollout.Anchor, error)
	Tier     string
	Evidence EvidenceRule // empty: EvidencePublished
	Log      *slog.Logger
}

// edges lists every allowed move. docs/diagrams/agent.dot is generated from
// it, and a test fails when the two differ.
var edges = map[wire.Phase][]wire.Phase{
	wire.Idle: {
		wire.Staged,
		wire.Transitioning, // the loader has loaded it at boot
	},
	wire.Staged: {
		wire.Loading,
		wire.Staged, // a newer livepatch superseded this one
		wire.Idle,   // what was staged is damaged, or for a kernel that no longer runs
	},
	wire.Loading: {
		wire.Transitioning,
		wire.Failed,
		wire.Staged, // nothing was loaded and later may be better
		wire.Idle,   // another kernel was booted
	},
	wire.Transitioning: {
		wire.Soaking,
		wire.Stalled,
		wire.Failed,
		wire.Staged, // an orderly reboot came between
		wire.Idle,   // another kernel was booted
	},
	wire.Stalled: {wire.Staged},
	wire.Soaking: {
		wire.Confirmed,
		wire.Suspect,
		wire.Transitioning, // an orderly reboot came between and the loader has loaded it
		wire.Failed,
		wire.Staged, // an orderly reboot came between
		wire.Idle,   // another kernel was booted
	},
	wire.Confirmed: {wire.Idle},
	wire.Suspect:   {wire.Idle}, // not undone: the publisher supersedes it
	wire.Failed:    {wire.Idle},
}

// Step does the work of the current phase and says how long to wait before
// the next call. An error is one that Step could not handle: the journal
// cannot be read or written.
func (a *Agent) Step(ctx context.Context) (time.Duration, error) {
	switch p := a.journal().Phase; p {
	case wire.Idle:
		return a.idle(ctx)
	case wire.Staged:
		return a.staged(ctx)
	case wire.Loading:
		return a.load(ctx)
	case wire.Transitioning:
		return a.watch(ctx)
	case wire.Stalled:
		return a.restage(ctx)
	case wire.Soaking:
		return a.soak(ctx)
	case wire.Confirmed, wire.Suspect, wire.Failed:
		return a.finish()
	default:
		return 0, fmt.Errorf("journal holds unknown phase %q", p)
	}
}

// Agent is the journey of one machine. Run is called once; the other exported
// methods may be called by several goroutines meanwhile.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	order []check
	close func() error // gives the state up to another klatchd

	asks chan func(context.Context) // run between two steps
	wake chan struct{}              // reports wait to be sent
	// reached says that the server has just answered a check.
	reached chan struct{}

	mu   sync.Mutex
	j    journal
	seen observation
	said uint64 // counts what the loader said in passing
	told told

	next     time.Time // of the next check; zero: never
	netFails int       // checks in a row that found nobody
}

// New opens the journal, or begins one. The state is this agent's alone until
// Run ends; a second one is refused.
func New(cfg Config) (*Agent, error) {
	if err := os.MkdirAll(filepath.Join(cfg.Dir, stageDir), 0o700); err != nil {
		return nil, err
	}
	unlock, err := durable.Lock(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return nil, err
	}
	for _, d := range []string{cfg.Dir, filepath.Join(cfg.Dir, stageDir)} {
		if err := durable.RemoveTemp(d); err != nil {
			return nil, errors.Join(err, unlock())
		}
	}
	j, err := openJournal(cfg.Dir)
	if err != nil {
		return nil, errors.Join(err, unlock())
	}
	return &Agent{
		cfg: cfg, log: cfg.Log, order: order(), close: unlock, j: j, told: keptNotice(cfg),
		asks: make(chan func(context.Context)),
		wake: make(chan struct{}, 1), reached: make(chan struct{}, 1),
	}, nil
}

// Run goes on until ctx ends. beat is called at least every half minute while
// the agent is well; it may be nil.
func (a *Agent) Run(ctx context.Context, beat func()) (err error) {
	defer func() { err = errors.Join(err, a.close()) }()
	sent := make(chan struct{})
	sending, stopSending := context.WithCancel(ctx)
	go func() { a.sendReports(sending); close(sent) }()
	defer func() { stopSending(); <-sent }()

	a.setNext(firstCheck(a.cfg.Policy, time.Now()))
	for awake := false; ctx.Err() == nil; {
		wait, err := heartbeat, error(nil)
		if !awake {
			awake, err = a.wakeUp(ctx)
		}
		if awake && err == nil {
			wait, err = a.Step(ctx)
		}
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		if beat != nil {
			beat()
		}
		timer := time.NewTimer(min(max(wait, 0), heartbeat))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case ask := <-a.asks:
			ask(ctx)
		}
		timer.Stop()
	}
	return a.farewell(context.WithoutCancel(ctx))
}

// farewell is for a daemon that is stopped in order, perhaps because the
// machine goes down. Whoever lives to see that has not lost the machine: if
// the next start is in another boot, that was a reboot and not a crash. For
// the same reason a livepatch that was put back at boot need not count.
func (a *Agent) farewell(ctx context.Context) error {
	if j := a.journal(); j.Phase == wire.Soaking && j.Work.AtBoot {
		if verdict, _ := a.cfg.Machine.Since(j.Work.Marks); verdict != facts.Trouble {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			if _, err := a.cfg.Loader.Confirm(ctx, j.Work.Sequence); err == nil {
				if err := a.move(wire.Confirmed, nil, note{event: wire.EventConfirmed, sequence: j.Work.Sequence, fixes: j.Work.Fixes, code: "at_boot"}); err != nil {
					return err
				}
			}
		}
	}
	boot := a.bootID()
	return a.update(func(j *journal) { j.Orderly = boot })
}

// heartbeat bounds how long Run sleeps, for the watchdog of systemd.
const heartbeat = 30 * time.Second

// between runs f between two steps and waits for it.
func (a *Agent) between(ctx context.Context, f func(context.Context) error) error {
	done := make(chan error, 1)
	ask := func(run context.Context) {
		// The asker's patience and the daemon's life both bound the work.
		both, cancel := context.WithCancel(run)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		done <- f(both)
	}
	select {
	case a.asks <- ask:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *Agent) bootID() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen.Facts.BootID
}

// lastSeen is the last look at the machine.
func (a *Agent) lastSeen() observation {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen
}
