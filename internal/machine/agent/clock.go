// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"time"

	"klatch/internal/fault"
)

// Floor is a time that the clock may not be before, and who said it. It comes
// from signed data that was verified, never from the clock itself: a clock that
// was ahead once must not make the right time wrong.
type Floor struct {
	Time time.Time `json:"time"`
	From string    `json:"from"` // build, metadata, rollout, recalls, cosignature
}

// clockSlack is how far a clock may be behind without being called wrong: time
// daemons step by seconds. Package tufclient allows the same.
const clockSlack = 2 * time.Minute

const codeClock fault.Code = "clock_back"

// floor is the newest of what is known: of the journal and of the program.
func floor(j journal, built time.Time) Floor {
	if j.Floor != nil && j.Floor.Time.After(built) {
		return *j.Floor
	}
	if built.IsZero() {
		return Floor{}
	}
	return Floor{Time: built.UTC(), From: "build"}
}

// checkClock is pure.
func checkClock(now time.Time, f Floor) error {
	if f.Time.Sub(now) <= clockSlack {
		return nil
	}
	return fault.New(fault.Unavailable, codeClock, "the clock says %s, before %s, which was signed (%s)",
		now.UTC().Format(time.RFC3339), f.Time.Format(time.RFC3339), f.From).
		WithHint("set the machine's clock; until then nothing is believed, and what is loaded stays loaded")
}

// raiseFloor takes a signed time that was just verified. One after the start of
// this look is refused before it is kept: either the clock is behind, or
// somebody signs the future to stop the machine's clock there.
func (a *Agent) raiseFloor(start, signed time.Time, from string) error {
	f := Floor{Time: signed.UTC().Truncate(time.Second), From: from}
	if err := checkClock(start, f); err != nil {
		return at(StepClock, err)
	}
	if signed.IsZero() || !f.Time.After(floor(a.journal(), a.cfg.Built).Time) {
		return nil
	}
	return a.update(func(j *journal) { j.Floor = &f })
}
