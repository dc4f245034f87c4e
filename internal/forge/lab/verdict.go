// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"regexp"
)

// Verdict is the outcome of one trial in the lab. The stored form is the
// string; it is never renamed.
type Verdict string

// The verdicts.
const (
	Pass   Verdict = "pass"
	Fail   Verdict = "fail"   // the livepatch is to blame
	Broken Verdict = "broken" // the lab is to blame, or nobody knows
)

// BrokenError is a fault of the lab: the machine did not start, the line is
// cut, the emulator died. It never says anything about a livepatch.
type BrokenError struct {
	// What was tried, on what.
	What string
	Err  error
}

// Error implements error.
func (e *BrokenError) Error() string { return "lab broken: " + e.What + ": " + e.Err.Error() }

// Unwrap gives the cause.
func (e *BrokenError) Unwrap() error { return e.Err }

// Brokenf makes a BrokenError; nil stays nil. An error that is broken
// already, or that says the guest restarted, is only wrapped: who noticed
// first knows best.
func Brokenf(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	var b *BrokenError
	if errors.As(err, &b) || errors.Is(err, ErrGuestRebooted) {
		return fmt.Errorf("%s: %w", what, err)
	}
	return &BrokenError{What: what, Err: err}
}

// FailError is a fault of the thing under test: a check that did not hold, a
// command that ended otherwise than it should.
type FailError struct{ Reason string }

// Error implements error.
func (e *FailError) Error() string { return e.Reason }

// Failf makes a FailError.
func Failf(format string, args ...any) error { return &FailError{Reason: fmt.Sprintf(format, args...)} }

// Judge turns the end of a trial into a verdict. The console must be the
// part that was printed while the livepatch was in the kernel or going in:
// trouble before that is not the livepatch's, so callers cut the text where
// the trial began.
//
// Trouble on that console is the kernel's own word and outweighs everything:
// a guest that does not answer after an oops is a fail. The one exception is
// trouble that an emulator makes by itself: broken. Without trouble only a
// FailError is a fail; any other error, known or not, is broken.
func Judge(err error, console string) (Verdict, []Trouble) {
	return JudgeTroubles(err, ScanConsole(console))
}

// JudgeTroubles is Judge for troubles that were found before, and of which
// those that a trial expects were taken out.
func JudgeTroubles(err error, troubles []Trouble) (Verdict, []Trouble) {
	var failed *FailError
	switch {
	case len(troubles) > 0 && troubles[0].notInMemory():
		return Broken, troubles // and the rest is its consequence
	case len(troubles) > 0:
		return Fail, troubles
	case err == nil:
		return Pass, nil
	case errors.As(err, &failed) && !isBroken(err):
		return Fail, nil
	default:
		return Broken, nil
	}
}

// notInMemory says that a processor stumbled over a breakpoint that its memory
// does not hold. The kernel puts one there for a moment, while it changes its
// own code under running processors (arch/x86/kernel/alternative.c,
// text_poke_bp_batch), and waits until each has seen it go. An emulator that
// runs several processors at once now and then lets one run the old bytes after
// that. No livepatch does this, and on no real machine was it seen: it is the
// lab's fault.
func (t Trouble) notInMemory() bool {
	if t.Kind != Oops || !int3Title.MatchString(t.Title) {
		return false
	}
	m := int3Code.FindStringSubmatch(t.Report)
	return m != nil && m[1] != int3
}

const int3 = "cc" // the instruction

var (
	int3Title = regexp.MustCompile(`^(?:Oops: )?int3: `)
	// The byte before the one in angle brackets is what the processor must
	// have run: after this trap it points to the next one.
	int3Code = regexp.MustCompile(`(?m)^Code: (?:[0-9a-f]{2} )*([0-9a-f]{2}) <[0-9a-f]{2}>`)
)

// isBroken: a failed check that was joined with a fault of the lab proves
// nothing.
func isBroken(err error) bool {
	var b *BrokenError
	return errors.As(err, &b)
}
