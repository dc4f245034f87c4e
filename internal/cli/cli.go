// SPDX-License-Identifier: Apache-2.0

// Package cli is what every command shares over cobra: how an error ends up on
// the terminal, which exit status it gives, JSON with a version, and progress
// lines. It must not know any command. Start with Run.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"klatch/internal/fault"
)

// Run executes a program and returns its exit status. An error is printed as
//
//	klatch: cannot load livepatch 7: load module klatch_7: key not trusted
//	hint: enroll the publisher's module key, then reboot
//
// and its kind gives the status (package fault). Mistakes in the command line
// are of kind invalid. SIGINT and SIGTERM cancel the command's context.
func Run(root *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return RunContext(ctx, root)
}

// RunContext is Run with a context of the caller, for tests.
func RunContext(ctx context.Context, root *cobra.Command) int {
	root.SilenceErrors, root.SilenceUsage = true, true
	started := false
	prepare(root, &started)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if status, ok := errors.AsType[*statusError](err); ok {
		return int(*status)
	}
	if !started {
		err = fault.New(fault.Invalid, "usage", "%w", err).WithHint("see: %s --help", cmd.CommandPath())
	}
	text := err.Error()
	if _, said := errors.AsType[*cannotError](err); !said && started {
		text = fmt.Sprintf("cannot run %s: %s", cmd.CommandPath(), text)
	}
	w := root.ErrOrStderr()
	fmt.Fprintf(w, "%s: %s\n", root.Name(), Clean(text)) //nolint:errcheck // nowhere left to tell
	if hint := fault.HintOf(err); hint != "" {
		fmt.Fprintf(w, "hint: %s\n", Clean(hint)) //nolint:errcheck // as above
	}
	return fault.ExitStatus(err)
}

// Clean takes control characters, and those that turn the direction of
// writing, out of a text before a person's terminal obeys them: a server, a
// machine or a compiler may have put them there. Line ends and tabs stay.
func Clean(s string) string {
	return strings.Map(func(r rune) rune {
		if (unicode.IsControl(r) || unicode.Is(unicode.Cf, r)) && r != '\n' && r != '\t' {
			return ' '
		}
		return r
	}, s)
}

// prepare notes when a command's own code begins, which tells a wrong command
// line from a command that failed.
func prepare(c *cobra.Command, started *bool) {
	if run := c.RunE; run != nil {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			*started = true
			return run(cmd, args)
		}
	}
	for _, sub := range c.Commands() {
		prepare(sub, started)
	}
}

type cannotError struct {
	what string
	err  error
}

func (e *cannotError) Error() string { return "cannot " + e.what + ": " + e.err.Error() }
func (e *cannotError) Unwrap() error { return e.err }

// Cannot says in the user's words what did not work. Commands wrap what they
// return with it; nil stays nil.
func Cannot(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &cannotError{fmt.Sprintf(format, args...), err}
}

type statusError int

func (e *statusError) Error() string { return fmt.Sprintf("exit status %d", int(*e)) }

// ExitWith ends the program with a status and prints nothing: the command has
// said all, such as `klatch status --check` when a person must act.
func ExitWith(status int) error {
	e := statusError(status)
	return &e
}

// WriteJSON prints an object for programs: indented, its first member the
// version of its form. v must encode as a JSON object without "version".
func WriteJSON(w io.Writer, version int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	body, ok := strings.CutPrefix(string(b), "{")
	if !ok {
		return fmt.Errorf("write JSON: %T is no object", v)
	}
	comma := ","
	if body == "}" {
		comma = ""
	}
	raw := json.RawMessage(fmt.Sprintf(`{"version":%d%s%s`, version, comma, body))
	out, err := json.MarshalIndent(raw, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", out)
	return err
}

// Progress prints one line per step, with the time since the start. It is for
// standard error, so that output stays clean.
type Progress struct {
	w     io.Writer
	start time.Time
}

// NewProgress starts the watch. A nil writer prints nothing.
func NewProgress(w io.Writer) *Progress { return &Progress{w, time.Now()} }

// Step prints a line such as "   1.2s  download kernel image (120 MB)".
func (p *Progress) Step(format string, args ...any) {
	if p.w != nil {
		fmt.Fprintf(p.w, "%7.1fs  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...)) //nolint:errcheck // decoration
	}
}
