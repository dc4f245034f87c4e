// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"math/rand/v2"
	"time"

	"klatch/internal/fault"
)

// Policy is what the machine's owner decides about time.
type Policy struct {
	CheckInterval time.Duration // 0: never by itself
	Deadline      time.Duration // of a transition
	Soak          time.Duration
	StallRetry    time.Duration // first wait after a stall; doubles
}

// DefaultPolicy is in force where nothing is configured.
func DefaultPolicy() Policy {
	return Policy{
		CheckInterval: time.Hour,
		// The kernel signals stragglers after 15 s; a task that has not moved
		// after four such rounds will not do so soon.
		Deadline:   time.Minute,
		Soak:       15 * time.Minute,
		StallRetry: 10 * time.Minute,
	}
}

// soakAtBoot bounds the soak of a livepatch that was put back at boot. It had
// its full soak before; the rest only clears the boot-loop breaker, and must
// not count a second quick reboot against it.
const soakAtBoot = time.Minute

func (p Policy) soak(w work) time.Duration {
	if w.AtBoot {
		return min(p.Soak, soakAtBoot)
	}
	return p.Soak
}

// firstCheck comes soon after start, but not at the same moment on all
// machines of a rack that lost power.
func firstCheck(p Policy, now time.Time) time.Time {
	if p.CheckInterval == 0 {
		return time.Time{}
	}
	return now.Add(upTo(min(p.CheckInterval/10, 30*time.Second)))
}

// nextCheck is a tenth of the interval around it, so that a fleet spreads.
func nextCheck(p Policy, now time.Time) time.Time {
	if p.CheckInterval == 0 {
		return time.Time{}
	}
	return now.Add(around(p.CheckInterval))
}

// upTo spreads machines over time; nobody gains by guessing it.
func upTo(d time.Duration) time.Duration {
	return rand.N(d + 1) //nolint:gosec // see above
}

func around(d time.Duration) time.Duration {
	return d - d/10 + upTo(d/5)
}

const (
	backoffFirst = 30 * time.Second
	backoffMost  = time.Hour
	stallMost    = 6 * time.Hour
)

// backoff is the wait after the n-th failure in a row, from 1: it doubles up
// to a limit. The upper half is random, so that a returning server is not
// met by all machines at once.
func backoff(n int, first, most time.Duration) time.Duration {
	d := first
	for i := 1; i < n && d < most; i++ {
		d *= 2
	}
	d = min(d, most)
	return d - d/4 + upTo(d/4)
}

// afterCheck says when to look again. A server that cannot be reached is
// tried sooner than the interval at first; anything else waits its turn,
// because asking again soon changes nothing.
func (a *Agent) afterCheck(err error, now time.Time) {
	if fault.KindOf(err) != fault.Unavailable {
		a.netFails = 0
		a.setNext(nextCheck(a.cfg.Policy, now))
		return
	}
	a.netFails++
	if a.cfg.Policy.CheckInterval > 0 {
		a.setNext(now.Add(backoff(a.netFails, backoffFirst, backoffMost)))
	}
}

func (a *Agent) setNext(t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.next = t
}

// untilCheck is the time left; without checks it is the heartbeat.
func (a *Agent) untilCheck(now time.Time) time.Duration {
	if a.next.IsZero() {
		return heartbeat
	}
	return a.next.Sub(now)
}

func (a *Agent) checkIsDue(now time.Time) bool { return !a.next.IsZero() && !now.Before(a.next) }

// poll is how long to wait before looking at a transition again: each second
// at first, then slower.
func poll(since time.Duration) time.Duration {
	switch {
	case since < 30*time.Second:
		return time.Second
	case since < 5*time.Minute:
		return 5 * time.Second
	default:
		return 15 * time.Second
	}
}
