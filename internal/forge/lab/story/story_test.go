// SPDX-License-Identifier: Apache-2.0

package story_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/lab/story"
)

var grammar = story.Grammar{
	Needs:     []string{"check", "modules"},
	Variables: []string{"PID", "THIS"},
	Commands: map[string]story.Command{
		"load": {Check: func(args []string) error {
			if len(args) > 1 {
				return errors.New("want at most one livepatch")
			}
			return nil
		}, MayFail: true},
		"reboot": {},
		"run":    {Check: func([]string) error { return nil }, MayFail: true},
	},
}

const whole = `# It loads, and
#it runs.
# More of it.

# Not a part of what it proves.
needs: check modules
cpus: 2
timeout: 3m
limit: 90s
take: tool data/x
required: no
each: earlier

load
! load 'a b' # twice is refused
[modules] [!check] run "x \" \\ ${PID}" y\ z '${PID}' ${THIS}.ko $x a#b ''
reboot
-- bin/tool --
#!/bin/sh
exit 0
-- empty --
-- data --
not a script
`

func TestAWholeStory(t *testing.T) {
	s, err := story.Parse("some/dir/replace-all.txtar", []byte(whole), grammar)
	if err != nil {
		t.Fatal(err)
	}
	if s.Name != "replace-all" || s.Proves != "It loads, and it runs. More of it." || s.Required || s.Each != "earlier" ||
		s.CPUs != 2 || s.Timeout != 3*time.Minute || s.Limit != 90*time.Second || !slices.Equal(s.Take, []string{"tool", "data/x"}) {
		t.Errorf("header: %+v", s)
	}
	var got []string
	for _, st := range s.Steps {
		var args []string
		for _, a := range st.Args {
			args = append(args, a.Fill(strings.ToLower))
		}
		got = append(got, fmt.Sprintf("%d %v%v%s %q", st.Line, st.If, map[bool]string{true: "!"}[st.Not], st.Name, args))
	}
	want := []string{`14 []load []`, `15 []!load ["a b"]`,
		`16 [{false modules} {true check}]run ["x \" \\ pid" "y z" "${PID}" "this.ko" "$x" "a#b" ""]`, `17 []reboot []`}
	if !slices.Equal(got, want) {
		t.Errorf("steps\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for i, w := range []string{"bin/tool 755 #!/bin/sh\nexit 0\n", "empty 644 ", "data 644 not a script\n"} {
		if f := s.Files[i]; fmt.Sprintf("%s %o %s", f.Name, f.Mode(), f.Data) != w {
			t.Errorf("file %d: %q %o %q", i, f.Name, f.Mode(), f.Data)
		}
	}
}

func TestWhatIsWrongIsSaidWithItsLine(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"nothing said", "load\n", "x.txtar:1: it does not say what it proves"},
		{"no commands", "# a\n", "x.txtar: it has no commands"},
		{"unknown command", "# a\n\nlaod\n", `x.txtar:3: command "laod" is unknown`},
		{"wrong arguments", "# a\nload a b\n", "x.txtar:2: load: want at most one livepatch"},
		{"no arguments taken", "# a\nreboot now\n", "x.txtar:2: reboot takes no arguments"},
		{"nothing to fail", "# a\n! reboot\n", "x.txtar:2: ! before reboot means nothing"},
		{"unknown variable", "# a\nrun ${PIDD}\n", "x.txtar:2: ${PIDD} is unknown; there are PID, THIS"},
		{"variable as command", "# a\n${PID}\n", "x.txtar:2: a variable as command"},
		{"open quote", "# a\nrun \"x\n", "x.txtar:2: a quote that does not end"},
		{"open single quote", "# a\nrun 'x\n", "x.txtar:2: a quote that does not end"},
		{"unknown condition", "# a\n[chekc] load\n", "x.txtar:2: condition [chekc] is unknown"},
		{"open condition", "# a\n[check load\n", "x.txtar:2: a condition without ]"},
		{"unknown header", "# a\nneed: check\nload\n", `x.txtar:2: header "need" is unknown`},
		{"header twice", "# a\ncpus: 1\ncpus: 2\nload\n", "x.txtar:3: cpus: is there twice"},
		{"header after commands", "# a\nload\ncpus: 1\n", `x.txtar:3: command "cpus:" is unknown`},
		{"unknown need", "# a\nneeds: luck\nload\n", `x.txtar:2: needs: "luck" is unknown; there are check, modules`},
		{"required neither", "# a\nrequired: maybe\nload\n", `x.txtar:2: required: "maybe", want yes or no`},
		{"too many processors", "# a\ncpus: 17\nload\n", `x.txtar:2: cpus: "17", want a number from 1 to 16`},
		{"time without unit", "# a\ntimeout: 10\nload\n", `x.txtar:2: timeout: "10", want a time such as 30s`},
		{"out of its folder", "# a\ntake: ../x\nload\n", `x.txtar:2: take: "../x" is not a path beside the story`},
		{"each of what", "# a\neach: cpu\nload\n", `x.txtar:2: each: "cpu", want "earlier"`},
		{"file out of its folder", "# a\nload\n-- ../x --\n", `x.txtar:3: file "../x": not a path below /lab`},
		{"file twice", "# a\nload\n-- x --\ny\n-- x --\n", "x.txtar:5: file x is there twice"},
		{"control characters", "# a\nrun \x1b[2J\n", "x.txtar:2: control characters"},
		{"no UTF-8", "# a\nrun \xff\n", "x.txtar:2: control characters, or no UTF-8"},
		{"a long line", "# a\nrun " + strings.Repeat("x", 5000) + "\n", "x.txtar:2: line of 5004 bytes"},
		{"many words", "# a\nrun" + strings.Repeat(" x", 100) + "\n", "x.txtar:2: 101 words, limit 64"},
		{"many commands", "# a\n" + strings.Repeat("load\n", 501), "x.txtar:502: over 500 commands"},
		{"too large", "# a\nload\n-- x --\n" + strings.Repeat("x", story.MaxText), "limit 1048576"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := story.Parse("x.txtar", []byte(c.text), grammar)
			if err == nil || !strings.Contains(err.Error(), c.want) || fault.KindOf(err) != fault.Invalid {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	for _, name := range []string{"x.txt", "X.txtar", ".txtar", "a b.txtar", "-a.txtar"} {
		if _, err := story.Parse(name, []byte("# a\nload\n"), grammar); err == nil {
			t.Errorf("the file name %q was taken", name)
		}
	}
}

// FuzzParse: whatever the text is, Parse answers, and a story that it takes is
// within the limits and reads the same a second time.
func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("# a\nrun \"${PID\" '\\'' \\"))
	f.Add([]byte("# a\nload\n-- a --\n-- --\n--  --\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := story.Parse("x.txtar", text, grammar)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Errorf("kind %s: %v", fault.KindOf(err), err)
			}
			return
		}
		if len(s.Steps) == 0 || len(s.Steps) > 500 || len(s.Files) > 64 || s.Proves == "" || s.Timeout <= 0 || s.Timeout > story.MaxTimeout {
			t.Errorf("over a limit: %+v", s)
		}
		lines := strings.Split(string(text), "\n")
		for _, st := range s.Steps {
			if _, ok := grammar.Commands[st.Name]; !ok || strings.TrimSpace(lines[st.Line-1]) != st.Text {
				t.Errorf("step %+v is not line %d", st, st.Line)
			}
		}
		again, err := story.Parse("x.txtar", text, grammar)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(s) {
			t.Errorf("read again: %v", err)
		}
	})
}
