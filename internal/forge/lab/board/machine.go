// SPDX-License-Identifier: Apache-2.0

package board

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/framed"
	"klatch/internal/forge/lab/guest"
)

// lineLimit is how long a serial line may be gone while somebody waits for
// an answer. One made of a program may be gone for a whole restart.
const lineLimit = 10 * time.Second

// closeLimit is what Close gives the power command besides its own limit.
const closeLimit = time.Minute

// machine is the board while one user has it.
type machine struct {
	rig       *Rig
	spec      lab.Spec
	want      version
	bootLimit time.Duration
	unlock    func() error

	console     *console
	line        *line
	consoleLine *line // nil when the kernel prints on line
	copying     sync.WaitGroup
	link        *framed.Link
	client      *guest.Client

	power sync.Mutex // one change of power at a time

	mu     sync.Mutex // of what follows and spec.Append
	ready  string     // boot id that was made ready
	chosen []string   // words that a kernel was chosen with last
	closed bool
}

// tunable is a machine whose kernel can be told something else.
type tunable struct{ *machine }

var _ lab.Tunable = tunable{}

// Append implements lab.Tunable.
func (t tunable) Append(words ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.spec.Append = slices.Clone(words)
}

func (m *machine) name() string { return m.spec.Name + " on board " + m.rig.cfg.File.Name }

func (m *machine) running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.closed && m.client != nil
}

// open is nil while the machine may be used. A board that restarted and that
// nobody awaited is not ready: it has neither its files nor, perhaps, the
// right kernel.
func (m *machine) open() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return errors.New("machine is closed")
	case m.client.Hello().BootID != m.ready:
		return lab.ErrGuestRebooted
	}
	return nil
}

// Run implements lab.Guest.
func (m *machine) Run(ctx context.Context, c lab.Command) (lab.Result, error) {
	if err := m.open(); err != nil {
		return lab.Result{}, m.explain(err, "run")
	}
	ctx, cancel := m.watch(ctx)
	defer cancel()
	res, err := m.client.Run(ctx, c)
	return res, m.explain(err, "run")
}

// Put implements lab.Guest.
func (m *machine) Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error {
	if err := m.open(); err != nil {
		return m.explain(err, "put")
	}
	ctx, cancel := m.watch(ctx)
	defer cancel()
	return m.explain(m.client.Put(ctx, path, mode, content), "put")
}

// BootID implements lab.Guest.
func (m *machine) BootID() string { return m.client.Hello().BootID }

// Await implements lab.Power.
func (m *machine) Await(ctx context.Context, notBootID string) error {
	return lab.Brokenf(m.await(ctx, notBootID), "await restart of %s", m.name())
}

// Reboot implements lab.Power.
func (m *machine) Reboot(ctx context.Context) error {
	if err := m.open(); err != nil && !errors.Is(err, lab.ErrGuestRebooted) {
		return m.explain(err, "reboot")
	}
	before := m.BootID()
	if err := m.client.Reboot(ctx); err != nil {
		return m.explain(err, "reboot")
	}
	return m.Await(ctx, before)
}

// Reset implements lab.Power.
func (m *machine) Reset(ctx context.Context) error {
	reset := m.rig.cfg.File.Power.Reset
	if len(reset) == 0 {
		return m.PowerCut(ctx)
	}
	before, err := m.change(ctx, "reset", func() error {
		if err := m.command(ctx, reset); err != nil {
			return err
		}
		m.link.Forget()
		return nil
	})
	if err != nil {
		return err
	}
	return m.Await(ctx, before)
}

// PowerCut implements lab.Power.
func (m *machine) PowerCut(ctx context.Context) error {
	before, err := m.change(ctx, "power cut", func() error {
		if err := m.powerOff(ctx); err != nil {
			return err
		}
		return m.powerOn(ctx)
	})
	if err != nil {
		return err
	}
	return m.Await(ctx, before)
}

func (m *machine) change(ctx context.Context, how string, do func() error) (before string, err error) {
	m.power.Lock()
	defer m.power.Unlock()
	if err := m.open(); err != nil && !errors.Is(err, lab.ErrGuestRebooted) {
		return "", lab.Brokenf(err, "%s of %s", how, m.name())
	}
	before = m.BootID()
	m.rig.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "board restarts", slog.String("board", m.rig.cfg.File.Name), slog.String("how", how))
	return before, lab.Brokenf(do(), "%s of %s", how, m.name())
}

// Link implements lab.Power.
func (m *machine) Link(context.Context, bool) error {
	return lab.Brokenf(errors.New("nobody can pull a board's network cable from here"), "set link of %s", m.name())
}

// Close implements lab.Machine.
func (m *machine) Close() error {
	m.power.Lock()
	defer m.power.Unlock()
	m.mu.Lock()
	closed := m.closed
	m.closed = true
	m.mu.Unlock()
	if closed {
		return nil
	}
	// The board must not go on with what was tried, whatever became of the
	// caller's context.
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit+seconds(m.rig.cfg.File.Power.TimeoutSeconds))
	defer cancel()
	err := m.command(ctx, m.rig.cfg.File.Power.Off)
	if m.link != nil {
		err = errors.Join(err, m.link.Close()) // and the client, and the line
	}
	if m.consoleLine != nil {
		err = errors.Join(err, m.consoleLine.Close())
		m.copying.Wait()
	}
	if m.console != nil {
		err = errors.Join(err, m.console.Close())
	}
	return lab.Brokenf(errors.Join(err, m.unlock()), "close %s", m.name())
}

func (m *machine) command(ctx context.Context, argv []string) error {
	f := m.rig.cfg.File
	return powerCommand(ctx, argv, seconds(f.Power.TimeoutSeconds), f.Name)
}

// powerOff takes the power away for as long as the board's file says.
func (m *machine) powerOff(ctx context.Context) error {
	if err := m.command(ctx, m.rig.cfg.File.Power.Off); err != nil {
		return err
	}
	return sleep(ctx, seconds(*m.rig.cfg.File.Power.OffSeconds))
}

// lastBytes is what may still be under way when the power has gone.
const lastBytes = 500 * time.Millisecond

// powerOn gives the power back, unless the board is still there: then the
// command switches something else.
func (m *machine) powerOn(ctx context.Context) error {
	if err := sleep(ctx, lastBytes); err != nil {
		return err
	}
	m.line.renew()
	m.link.Forget()
	if *m.rig.cfg.File.Power.OffSeconds > 0 {
		if err := sleep(ctx, 2*time.Second); err != nil {
			return err
		}
		if !m.link.Heard().IsZero() {
			return errors.New("the board still speaks although its power is off: does the command switch another one?")
		}
	}
	return m.command(ctx, m.rig.cfg.File.Power.On)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// maxRestarts is how often a board may restart itself while it is made ready,
// as in virtual machines: what a livepatch brought down may come up later.
const maxRestarts = 4

// await waits for the agent's first word of another boot and makes the board
// ready. With a kernel to choose that takes two restarts.
func (m *machine) await(ctx context.Context, notBootID string) error {
	for restarts := 0; ; restarts++ {
		err := m.awaitOnce(ctx, notBootID)
		if !errors.Is(err, lab.ErrGuestRebooted) || restarts == maxRestarts {
			return settled(err)
		}
		notBootID = ""
	}
}

func (m *machine) awaitOnce(ctx context.Context, notBootID string) error {
	for chosen := false; ; chosen = true {
		if err := m.hello(ctx, notBootID); err != nil {
			return err
		}
		id := m.BootID()
		wrong, err := m.inspect(ctx)
		switch {
		case err != nil:
			return m.explain(err, "make ready")
		case wrong == "":
			if err := m.settle(ctx); err != nil {
				return m.explain(err, "make ready")
			}
			m.mu.Lock()
			m.ready = id
			m.mu.Unlock()
			return nil
		case chosen || len(m.rig.cfg.File.Kernel.Choose) == 0:
			return errors.New(wrong)
		}
		if err := m.choose(ctx); err != nil {
			return fmt.Errorf("%s: %w", wrong, m.explain(err, "choose the kernel"))
		}
		notBootID = id
	}
}

func (m *machine) hello(ctx context.Context, notBootID string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.bootLimit, fmt.Errorf("not within %v", m.bootLimit))
	defer cancel()
	_, err := m.client.Await(ctx, notBootID)
	return m.explain(err, "wait for the agent")
}

// inspect says what is wrong with the running kernel; nothing is the empty
// text.
func (m *machine) inspect(ctx context.Context) (wrong string, err error) {
	out, err := m.sh(ctx, stateScript)
	if err != nil {
		return "", err
	}
	s, err := parseState(out)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	words, before := m.spec.Append, m.chosen
	m.mu.Unlock()
	switch {
	case s.cpus < m.spec.CPUs:
		return "", fmt.Errorf("%d processors are wanted, the board has %d", m.spec.CPUs, s.cpus)
	case s.memoryMiB < m.spec.MemoryMiB*3/4: // the kernel keeps a part for itself
		return "", fmt.Errorf("%d MiB of memory are wanted, the board has %d", m.spec.MemoryMiB, s.memoryMiB)
	case s.running != m.want:
		return fmt.Sprintf("wrong kernel: the board runs %q, wanted is %q", s.running, m.want), nil
	case len(words) > 0 && !s.endsWith(words):
		return fmt.Sprintf("wrong kernel command line: it is %q, and should end with %q", s.commandLine, words), nil
	case len(words) == 0 && len(before) > 0 && s.endsWith(before):
		return fmt.Sprintf("wrong kernel command line: it is %q, and should not end with %q", s.commandLine, before), nil
	}
	return "", nil
}

// settle makes the right kernel usable.
func (m *machine) settle(ctx context.Context) error {
	if err := m.mark(ctx); err != nil {
		return err
	}
	return m.putFiles(ctx)
}

// chosenImage is where the kernel to choose is put.
const chosenImage = "/tmp/klatch-board-kernel"

// choose tells the board what to start next, and starts it.
func (m *machine) choose(ctx context.Context) error {
	k := m.rig.cfg.File.Kernel
	m.mu.Lock()
	words := m.spec.Append
	if len(words) > 0 {
		m.chosen = slices.Clone(words)
	}
	m.mu.Unlock()
	if k.says("{image}") {
		if err := m.putImage(ctx); err != nil {
			return err
		}
	}
	fill := strings.NewReplacer("{release}", m.want.release, "{image}", chosenImage, "{append}", strings.Join(words, " "))
	argv := make([]string, len(k.Choose))
	for i, w := range k.Choose {
		argv[i] = fill.Replace(w)
	}
	_, err := m.run(ctx, lab.Command{Argv: argv, Timeout: 2 * time.Minute})
	if errors.Is(err, lab.ErrGuestRebooted) && k.Restart == restartSelf {
		return nil
	}
	if err != nil {
		return err
	}
	switch k.Restart {
	case restartReboot:
		return m.client.Reboot(ctx)
	case restartPower:
		if err := m.powerOff(ctx); err != nil {
			return err
		}
		return m.powerOn(ctx)
	default: // restartSelf: it does so soon
		return nil
	}
}

// watch ends a wait for an answer when the line is gone for too long, or
// nothing was heard on it for as long as a restart may take.
func (m *machine) watch(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	limit := lineLimit
	if len(m.rig.cfg.File.Line.Command) > 0 {
		limit = m.bootLimit
	}
	began := time.Now()
	go func() {
		t := time.NewTicker(reopenEvery)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-t.C:
				if since, why := m.line.down(); !since.IsZero() && now.Sub(latest(since, began)) > limit {
					cancel(fmt.Errorf("line %s is gone: %w", m.line.name, why))
				}
				if quiet := now.Sub(latest(m.link.Heard(), began)); quiet > m.bootLimit {
					cancel(fmt.Errorf("nothing was heard from the board for %v", quiet.Round(time.Second)))
				}
			}
		}
	}()
	return ctx, func() { cancel(context.Canceled) }
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// explain makes an error of the line tell what else is known.
func (m *machine) explain(err error, what string) error {
	if err == nil {
		return nil
	}
	if !errors.Is(err, lab.ErrGuestRebooted) && m.line != nil {
		if since, why := m.line.down(); !since.IsZero() {
			err = fmt.Errorf("%w; line %s is down: %w", err, m.line.name, why)
		} else if heard := m.link.Heard(); heard.IsZero() {
			err = fmt.Errorf("%w; the agent was not heard", err)
		} else if quiet := time.Since(heard); quiet > 5*time.Second {
			err = fmt.Errorf("%w; the agent was heard last %v ago", err, quiet.Round(time.Second))
		}
		if raw, cerr := m.console.text(); cerr == nil {
			err = fmt.Errorf("%w; the console ends with %q", err, lastLines(lab.CleanConsole(raw), 3))
		}
	}
	return lab.Brokenf(err, "%s %s", what, m.name())
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// sh runs a script that must work.
func (m *machine) sh(ctx context.Context, script string) (string, error) {
	return m.run(ctx, lab.Command{Argv: []string{"sh", "-c", script}})
}

// run runs a program that must work, also on a board that is not ready.
func (m *machine) run(ctx context.Context, c lab.Command) (string, error) {
	ctx, cancel := m.watch(ctx)
	defer cancel()
	res, err := m.client.Run(ctx, c)
	switch {
	case err != nil:
		return "", err
	case res.TimedOut:
		return "", fmt.Errorf("%q on the board did not end in time", path.Base(c.Argv[0]))
	case res.Exit != 0:
		return "", fmt.Errorf("%q on the board: exit status %d: %s", c.Argv, res.Exit, strings.TrimSpace(string(res.Stderr)))
	}
	return string(res.Stdout), nil
}
