// SPDX-License-Identifier: Apache-2.0

package catalog

import (
	"fmt"
	"os"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/notice"
)

// Support says how long livepatches are made for a kernel build. It is no
// input of a build: another date gives the same livepatch.
type Support struct {
	// Until is the last day on which livepatches are made, as 2027-06-30;
	// empty means that nobody said.
	Until string `toml:"until,omitempty"`
	// Ended is the day on which somebody declared the kernel build dead:
	// machines that run it must update and reboot.
	Ended string `toml:"ended,omitempty"`
	// Through is the newest kernel that was declared dead with this one.
	Through kernel.Release `toml:"through,omitempty"`
	Reason  string         `toml:"reason,omitempty"`
	Instead kernel.Release `toml:"instead,omitempty"` // what to run
}

// State of support at some moment, in the words that machines are told.
type State = notice.State

// The states.
const (
	Supported = notice.Supported
	Ending    = notice.Ending
	Ended     = notice.Ended
	Unknown   = notice.Unknown
)

// Notice is what machines are told of it.
func (s Support) Notice() notice.Support {
	return notice.Support{Until: s.Until, Ended: s.Ended, Through: s.Through, Reason: notice.OneLine(s.Reason), Instead: s.Instead}
}

// At says what the state is, and how many whole days are left where an end is
// known.
func (s Support) At(now time.Time) (state State, days int, err error) { return s.Notice().At(now) }

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
