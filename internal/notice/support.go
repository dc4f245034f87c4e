// SPDX-License-Identifier: Apache-2.0

package notice

import (
	"fmt"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// Support says how long livepatches are made for a kernel build. Dates are days
// as 2027-06-30.
type Support struct {
	// Until is the last day on which livepatches are made; empty means that
	// nobody said.
	Until string `json:"until,omitempty"`
	// Ended is the day on which somebody declared the kernel build dead.
	Ended string `json:"ended,omitempty"`
	// Through is the newest kernel that was declared dead with this one; empty
	// means that it was this one alone.
	Through kernel.Release `json:"through,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Instead kernel.Release `json:"instead,omitempty"` // what to run
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

// Ahead is how long before its end support is called ending: two planned
// reboots of a fleet that reboots each month.
const Ahead = 60 * 24 * time.Hour

// At says what the state is, and how many whole days are left where an end is
// known. The last day counts as supported to its end, UTC.
func (s Support) At(now time.Time) (state State, days int, err error) {
	if s.Ended != "" {
		if _, err := time.Parse(time.DateOnly, s.Ended); err != nil {
			return Unknown, 0, badDate(s.Ended)
		}
		return Ended, 0, nil
	}
	if s.Until == "" {
		return Unknown, 0, nil
	}
	last, err := time.Parse(time.DateOnly, s.Until)
	if err != nil {
		return Unknown, 0, badDate(s.Until)
	}
	left := last.Add(24 * time.Hour).Sub(now)
	days = int(left / (24 * time.Hour))
	switch {
	case left <= 0:
		return Ended, 0, nil
	case left <= Ahead:
		return Ending, days, nil
	default:
		return Supported, days, nil
	}
}

// Text tells a person what the state is, and why.
func (s Support) Text(now time.Time) string {
	state, days, err := s.At(now)
	if err != nil {
		return "unknown: " + err.Error()
	}
	switch {
	case state == Unknown:
		return "unknown: the publisher names no end"
	case state != Ended:
		return fmt.Sprintf("%s until %s, %s", map[State]string{Supported: "supported", Ending: "ending: supported only"}[state], s.Until, leftText(days))
	}
	var b strings.Builder
	if s.Ended == "" {
		fmt.Fprintf(&b, "ended on %s", s.Until)
	} else {
		fmt.Fprintf(&b, "ended: declared dead on %s", s.Ended)
	}
	if s.Through != "" {
		fmt.Fprintf(&b, ", with all kernels up to %s", s.Through)
	}
	if s.Reason != "" {
		fmt.Fprintf(&b, " (%s)", s.Reason)
	}
	return b.String()
}

func leftText(days int) string {
	switch days {
	case 0:
		return "its last day"
	case 1:
		return "1 day left"
	default:
		return fmt.Sprintf("%d days left", days)
	}
}

func badDate(s string) error {
	return fault.New(fault.Invalid, "bad_date", "%.40q is not a date", s).WithHint("write it as 2027-06-30")
}
