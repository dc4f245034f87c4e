// SPDX-License-Identifier: Apache-2.0

package shell_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/shell"
)

// guest answers lines; what runs in a real one is tried by
// TestTestFromTheCommandLine.
type guest struct {
	lab.Machine
	awaited bool
}

func (g *guest) BootID() string { return "1" }
func (g *guest) Await(context.Context, string) error {
	g.awaited = true
	return nil
}

func (g *guest) Run(_ context.Context, c lab.Command) (lab.Result, error) {
	switch line := c.Argv[len(c.Argv)-1]; line {
	case "fails":
		return lab.Result{Exit: 3, Stderr: []byte("no\n")}, nil
	case "reboots":
		return lab.Result{}, lab.ErrGuestRebooted
	case "long":
		return lab.Result{Truncated: true, Stdout: []byte("much\n")}, nil
	case "evil":
		return lab.Result{Stdout: []byte("\x1b]0;title\x07\x1b[31mred\r\nè\t\u202e\xff\u009b2J\r"), Stderr: []byte("\x7f\n")}, nil
	case "cut":
		return lab.Result{}, lab.Brokenf(errors.New("line closed"), "run")
	default:
		return lab.Result{Stdout: []byte("ran " + line + "\n")}, nil
	}
}

func TestLines(t *testing.T) {
	for _, c := range []struct{ name, in, out, err string }{
		{"lines until their end", "a\n\n  b c \n", "ran a\nran b c\n", ""},
		{"exit ends it", "a\nexit\nb\n", "ran a\n", ""},
		{"a status", "fails\n", "no\n[status 3]\n", ""},
		{"cut output", "long\n", "much\n[output was cut]\n", ""},
		{"what a terminal would obey", "evil\n", `\x1b]0;title\a\x1b[31mred` + "\nè\t" + `\u202e\xff\u009b2J\r\x7f` + "\n", ""},
		{"and what the language says of it", ":evil\n", `done \x1b[2J` + "\n", ""},
		{"a restart", "reboots\na\n", "the machine restarted\nran a\n", ""},
		{"a command of the language", ":check flaw\n:bad\na\n", "done check flaw\nbad is unknown\nran a\n", ""},
		{"the lab's end is an error", "cut\na\n", "", "line closed"},
		{"a line without an end is", strings.Repeat("x", 20<<10), "", "too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			err := shell.Shell{Machine: &guest{}, In: strings.NewReader(c.in), Out: &out, Story: func(_ context.Context, line string) (string, error) {
				if line == "bad" {
					return "", errors.New("bad is unknown")
				}
				if line == "evil" {
					return "done \x1b[2J", nil
				}
				return "done " + line, nil
			}}.Run(t.Context())
			if out.String() != c.out || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q, %v; want %q, %s", out.String(), err, c.out, c.err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (shell.Shell{Machine: &guest{}, In: blocked{}, Out: &strings.Builder{}}).Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a person who says nothing: %v", err)
	}
}

type blocked struct{}

func (blocked) Read([]byte) (int, error) { select {} }
