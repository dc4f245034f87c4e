// SPDX-License-Identifier: Apache-2.0

package player

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"klatch/internal/forge/lab/story"
)

var update = flag.Bool("update", false, "write what is generated instead of comparing it")

const (
	docsFile  = "../../../../docs/reference/scenarios.md"
	docsBegin = "<!-- commands: generated from the tables of package player by make gen -->\n"
	docsEnd   = "<!-- end of commands -->\n"
)

//go:generate go test -run TestCommandsAreDocumented . -args -update

// TestCommandsAreDocumented keeps the reference equal to the tables.
func TestCommandsAreDocumented(t *testing.T) {
	b, err := os.ReadFile(docsFile)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(b), docsBegin)
	_, after, ok2 := strings.Cut(rest, docsEnd)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the commands", docsFile)
	}
	switch want := before + docsBegin + tables() + docsEnd + after; {
	case want == string(b):
	case *update:
		if err := os.WriteFile(docsFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s is not up to date: run make gen", docsFile)
	}
}

func tables() string {
	var b strings.Builder
	b.WriteString("\n### Commands\n\n| command | what it does |\n| --- | --- |\n")
	for _, v := range verbs() {
		fmt.Fprintf(&b, "| `%s` | %s |\n", strings.ReplaceAll(strings.TrimSpace(v.name+" "+v.usage), "|", `\|`), v.says)
	}
	b.WriteString("\n### Needs\n\n| need | met when |\n| --- | --- |\n")
	for _, n := range needs {
		fmt.Fprintf(&b, "| `%s` | %s |\n", n.name, n.says)
	}
	b.WriteString("\n### Variables\n\n| variable | value |\n| --- | --- |\n")
	for _, v := range variables {
		fmt.Fprintf(&b, "| `${%s}` | %s |\n", v.name, v.says)
	}
	b.WriteString("\n")
	return b.String()
}

// TestTheExamplesAreStories: what the documents show as a story is one.
func TestTheExamplesAreStories(t *testing.T) {
	for file, begin := range map[string]string{docsFile: "```\n# ", "../../../../docs/howto/own-scenario.md": "\n       # "} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, text, ok := strings.Cut(string(b), begin)
		if !ok {
			t.Errorf("%s shows no story", file)
			continue
		}
		end := "\n```"
		if begin[0] == '\n' {
			end = "\n   Put "
		}
		text, _, _ = strings.Cut(text, end)
		if _, err := story.Parse("example.txtar", []byte("# "+text), Grammar()); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
