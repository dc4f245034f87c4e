// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"fmt"
	"os"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// Support says how long livepatches are made for a kernel build. It is no
// input of a build: another date gives the same livepatch.
type Support struct {
	// Until is the last day on which livepatches are made, as 2027-06-30;
	// empty means that nobody said.
	Until string `toml:"until,omitempty"`
	// Ended is the day on which somebody declared the kernel build dead:
	// machines that run it must update and reboot.
	Ended   string         `toml:"ended,omitempty"`
	Reason  string         `toml:"reason,omitempty"`
	Instead kernel.Release `toml:"instead,omitempty"` // what to run
}

// State of support at some moment. The words are the glossary's; ending is
// supported for not much longer.
type State string

// The states.
const (
	Supported State = "supported"
	Ending    State = "ending"
	Ended     State = "ended"
	Unknown   State = "unknown"
)

// Notice is how long before its end support is called ending: two planned
// reboots of a fleet that reboots each month.
const Notice = 60 * 24 * time.Hour

const day = "2006-01-02"

// At says what the state is, and how many whole days are left where an end is
// known. The last day counts as supported to its end, UTC.
func (s Support) At(now time.Time) (state State, days int, err error) {
	if s.Ended != "" {
		if _, err := time.Parse(day, s.Ended); err != nil {
			return Unknown, 0, badDate(s.Ended)
		}
		return Ended, 0, nil
	}
	if s.Until == "" {
		return Unknown, 0, nil
	}
	last, err := time.Parse(day, s.Until)
	if err != nil {
		return Unknown, 0, badDate(s.Until)
	}
	left := last.Add(24 * time.Hour).Sub(now)
	days = int(left / (24 * time.Hour))
	switch {
	case left <= 0:
		return Ended, 0, nil
	case left <= Notice:
		return Ending, days, nil
	default:
		return Supported, days, nil
	}
}

func badDate(s string) error {
	return fault.New(fault.Invalid, "bad_date", "%.40q is not a date", s).WithHint("write it as 2027-06-30")
}

// Allow refuses to build for a kernel build whose support has ended.
func (e Entry) Allow(now time.Time) error {
	state, _, err := e.Support.At(now)
	if err != nil || state != Ended {
		return err
	}
	hint := "machines that run it must update and reboot"
	if e.Support.Instead != "" {
		hint += " into " + string(e.Support.Instead)
	}
	return fault.New(fault.Denied, "kernel_ended", "support of kernel %s has ended (%s)", e.Release, e.Support.why()).
		WithHint("%s; to go on all the same: klatch-forge kernel support --kernel %s --until DATE", hint, e.Release)
}

func (s Support) why() string {
	switch {
	case s.Reason != "":
		return s.Reason
	case s.Ended != "":
		return "declared on " + s.Ended
	default:
		return "on " + s.Until
	}
}

// keepSupport takes over what was said of a kernel build before, where a new
// entry for the same build says nothing.
func keepSupport(file string, e *Entry) error {
	if e.Support != (Support{}) {
		return nil
	}
	if _, err := os.Stat(file); os.IsNotExist(err) {
		return nil
	}
	old, err := read(file)
	if err != nil {
		return fmt.Errorf("support of the entry that is there: %w", err)
	}
	if old.BuildID == e.BuildID {
		e.Support = old.Support
	}
	return nil
}
