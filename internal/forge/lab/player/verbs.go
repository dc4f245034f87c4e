// SPDX-License-Identifier: Apache-2.0

package player

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/forge/lab/story"
)

// verb is one command of the language.
type verb struct {
	name  string
	usage string // of its arguments
	says  string // what it does, for docs/reference/scenarios.md
	not   bool   // "!" may stand before it
	check func(args []string) error
	do    func(p *Player, ctx context.Context, c call) error
}

// call is one use of a verb.
type call struct {
	args []string
	not  bool
}

// arg is an argument that may be left out.
func (c call) arg(i int, otherwise string) string {
	if i < len(c.args) {
		return c.args[i]
	}
	return otherwise
}

// verbs are all commands: those of the livepatch, of programs, and of the
// machine. A file with commands of its own adds its table here.
func verbs() []verb { return slices.Concat(livepatchVerbs, programVerbs, obstacleVerbs, machineVerbs) }

// needs are the words of "needs:" and of conditions, each with what it means.
var needs = []struct {
	name, says string
	lacks      func(p Play) (string, error) // why it is not there, or nothing
}{
	{"check", "a fix of the livepatch has a check", func(p Play) (string, error) {
		if slices.ContainsFunc(p.Built.Fixes, p.hasCheck) {
			return "", nil
		}
		return "no fix has a check", nil
	}},
	{"earlier", "there is an earlier sequence", func(p Play) (string, error) {
		if len(p.Earlier) > 0 {
			return "", nil
		}
		return "there is no earlier sequence", nil
	}},
	{"modules", "the livepatch replaces functions of modules", func(p Play) (string, error) {
		if reached, err := p.Reached(); err != nil || len(reached) > 0 {
			return "", nil // the error is told when it is played
		}
		return "the livepatch replaces functions of no module", nil
	}},
	{"kernel-functions", "the livepatch replaces functions of the kernel itself that can be traced", func(p Play) (string, error) {
		if len(p.traceable()) > 0 {
			return "", nil
		}
		return "the livepatch replaces no traceable function of the kernel itself", nil
	}},
	{"btf", "the kernel has type information for BPF programs, by the builder's symbol tables", func(p Play) (string, error) {
		if p.Tables.Vmlinux == "" {
			return "the builder's symbol tables are not known", nil
		}
		has, err := p.Tables.hasBTF()
		if err != nil {
			return "", fmt.Errorf("whether the kernel has type information could not be found out: %w", err)
		}
		if !has {
			return "the kernel has no type information", nil
		}
		return "", nil
	}},
	{"symbols", "the builder's symbol tables are known", func(p Play) (string, error) {
		if p.Tables.Vmlinux != "" {
			return "", nil
		}
		return "the builder's symbol tables are not known", nil
	}},
}

// Lacks says why a need is not met, or nothing. An error means that it could
// not be found out.
func (p Play) Lacks(need string) (string, error) {
	for _, n := range needs {
		if n.name == need {
			return n.lacks(p)
		}
	}
	return fmt.Sprintf("need %q is unknown", need), nil
}

// Grammar is the language as the player speaks it.
func Grammar() story.Grammar {
	g := story.Grammar{Commands: map[string]story.Command{}}
	for _, v := range verbs() {
		g.Commands[v.name] = story.Command{Check: v.check, MayFail: v.not}
	}
	for _, n := range needs {
		g.Needs = append(g.Needs, n.name)
	}
	for _, v := range variables {
		g.Variables = append(g.Variables, v.name)
	}
	return g
}

// Checks of arguments.

func count(low, high int) func(args []string) error {
	return func(args []string) error {
		if len(args) < low || len(args) > high {
			return fmt.Errorf("%d arguments, want %d to %d", len(args), low, high)
		}
		return nil
	}
}

// oneOf allows one of these words, or none where it may be left out.
func oneOf(optional bool, words ...string) func(args []string) error {
	return func(args []string) error {
		if len(args) == 0 && optional {
			return nil
		}
		if len(args) != 1 || !slices.Contains(words, args[0]) {
			return fmt.Errorf("%q, want one of %q", args, words)
		}
		return nil
	}
}

func oneRegexp(args []string) error {
	if len(args) != 1 {
		return errors.New("want one regular expression (quote it)")
	}
	_, err := regexp.Compile(args[0])
	return err
}

func oneDuration(optional bool) func(args []string) error {
	return func(args []string) error {
		if len(args) == 0 && optional {
			return nil
		}
		if len(args) != 1 {
			return errors.New("want one time such as 30s")
		}
		if strings.Contains(args[0], "${") {
			return nil // read when it is filled in
		}
		_, err := story.Duration(args[0], story.MaxTimeout)
		return err
	}
}

// duration reads what oneDuration checked, or a variable became.
func duration(c call, i int, otherwise time.Duration) (time.Duration, error) {
	if i >= len(c.args) {
		return otherwise, nil
	}
	return story.Duration(c.args[i], story.MaxTimeout)
}

func positive(s string, limit int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > limit {
		return 0, fmt.Errorf("%q, want a number from 1 to %d", s, limit)
	}
	return n, nil
}
