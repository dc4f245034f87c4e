// SPDX-License-Identifier: Apache-2.0

// Package shell lets a person look around in a lab machine, a line at a time.
//
// It is made of lab.Machine.Run, so it works on every rig, and from a file as
// well as from a terminal. Each line is a command of the guest's sh and shows
// its output when it has ended; the working folder and exported variables stay.
// It has no terminal: no editor, no pager, and what the guest prints is shown
// as text. Start with Run.
package shell

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"klatch/internal/forge/lab"
)

// Limits of one line, and of how long its command may take.
const (
	maxLine   = 16 << 10
	lineLimit = time.Hour
)

// state is kept in the guest between lines. A line with a syntax error ends
// its own sh only.
const state = `d=/tmp/.klatch-lab-shell
[ -f $d.env ] && . $d.env
[ -f $d.dir ] && cd "$(cat $d.dir)"
eval "$1"
s=$?
export -p > $d.env
pwd > $d.dir
exit $s`

// Shell is one session.
type Shell struct {
	Machine lab.Machine
	In      io.Reader
	Out     io.Writer
	Prompt  string // printed before each line; empty for input from a file
	// Story does one command of the lab's own language; lines that begin with
	// a colon go there.
	Story func(ctx context.Context, line string) (note string, err error)
}

// Run reads lines until "exit" or their end. An error is the lab's.
func (s Shell) Run(ctx context.Context) error {
	lines := make(chan string)
	failed := make(chan error, 1)
	done := make(chan struct{})
	defer close(done)
	go func() {
		sc := bufio.NewScanner(s.In)
		sc.Buffer(nil, maxLine)
		for sc.Scan() {
			select {
			case lines <- sc.Text():
			case <-done:
				return
			}
		}
		failed <- sc.Err()
	}()
	for {
		if err := s.print("%s", s.Prompt); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-failed:
			return err
		case line := <-lines:
			line = strings.TrimSpace(line)
			if line == "exit" {
				return nil
			}
			if err := s.line(ctx, line); err != nil {
				return err
			}
		}
	}
}

func (s Shell) line(ctx context.Context, line string) error {
	if line == "" {
		return nil
	}
	if command, ok := strings.CutPrefix(line, ":"); ok && s.Story != nil {
		note, err := s.Story(ctx, strings.TrimSpace(command))
		if err != nil && ctx.Err() == nil {
			return s.print("%v\n", err)
		}
		if err == nil && note != "" {
			return s.print("%s\n", note)
		}
		return err
	}
	before := s.Machine.BootID()
	res, err := s.Machine.Run(ctx, lab.Command{Argv: []string{"sh", "-c", state, "sh", line}, Timeout: lineLimit, MaxOutput: lab.DefaultMaxOutput})
	if errors.Is(err, lab.ErrGuestRebooted) {
		if err := s.print("the machine restarted\n"); err != nil {
			return err
		}
		return s.Machine.Await(ctx, before)
	}
	if err != nil {
		return err
	}
	if err := s.print("%s%s", res.Stdout, res.Stderr); err != nil {
		return err
	}
	switch {
	case res.TimedOut:
		return s.print("[ended after %s]\n", lineLimit)
	case res.Truncated:
		return s.print("[output was cut]\n")
	case res.Exit != 0:
		return s.print("[status %d]\n", res.Exit)
	}
	return nil
}

// print shows control sequences, colors too, as escapes: a guest that runs a
// livepatch under test must not move the cursor, set a title or type into the
// terminal of the person who looks at it. An interpreter of colors would be
// one more reader of foreign bytes.
func (s Shell) print(format string, args ...any) error {
	_, err := io.WriteString(s.Out, plain(fmt.Sprintf(format, args...)))
	return err
}

// plain keeps printable text, line ends and tabs. All else, and letters that
// turn the direction of writing, is spelled as in a Go string.
func plain(text string) string {
	var b strings.Builder
	text = strings.ReplaceAll(text, "\r\n", "\n")
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		if r == '\n' || r == '\t' || unicode.IsPrint(r) && (r != utf8.RuneError || n > 1) {
			b.WriteString(text[:n])
		} else {
			q := strconv.QuoteToASCII(text[:n])
			b.WriteString(q[1 : len(q)-1])
		}
		text = text[n:]
	}
	return b.String()
}
