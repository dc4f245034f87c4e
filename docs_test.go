// SPDX-License-Identifier: Apache-2.0

package klatch

import (
	"flag"
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what is generated instead of comparing it")

const (
	tableBegin = "<!-- import table: generated from arch_test.go by make gen -->\n"
	tableEnd   = "<!-- end of import table -->\n"
)

// TestImportTableIsDocumented keeps the table of ARCHITECTURE.md equal to
// the one that is enforced.
func TestImportTableIsDocumented(t *testing.T) {
	const file = "ARCHITECTURE.md"
	text := readText(t, file)
	before, rest, ok1 := strings.Cut(text, tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the import table", file)
	}
	want := before + tableBegin + importTable() + tableEnd + after
	switch {
	case text == want:
	case *update:
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("the import table of %s is not that of arch_test.go; run make gen", file)
	}
}

func importTable() string {
	names := []struct {
		name string
		list []string
	}{
		{"nouns and mechanisms", nounsAndMechanisms}, {"nouns, `durable`", withDurable},
		{"all nouns", nouns}, {"the root list", rootMay}, {"no I/O", noIO}, {"the root ban", rootBan},
	}
	word := func(list []string) string {
		if len(list) == 0 {
			return "—"
		}
		var words []string
		for _, n := range names { // replace a known list by its name, keep the rest
			if len(list) >= len(n.list) && !slices.ContainsFunc(n.list, func(s string) bool { return !slices.Contains(list, s) }) {
				words = append(words, n.name)
				list = slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(n.list, s) })
			}
		}
		for _, s := range list {
			if s == "*" {
				words = append(words, "chosen with a reason")
				continue
			}
			words = append(words, "`"+strings.TrimPrefix(s, "internal/")+"`")
		}
		return strings.Join(words, ", ")
	}
	var b strings.Builder
	b.WriteString("\n| package | may import of ours | libraries | must not import |\n| --- | --- | --- | --- |\n")
	for _, l := range layers {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", l.prefix, word(l.may), word(l.libs), word(l.not))
	}
	fmt.Fprintf(&b, "\nThe root list: %s. The root ban: %s. No I/O: %s. Drivers, imported by `cmd` only: %s. Third-party code the root program may link: %s.\n\n",
		ticks(rootMay), ticks(rootBan), ticks(noIO), ticks(drivers), ticks(rootLibs))
	return b.String()
}

func ticks(list []string) string {
	var out []string
	for _, s := range list {
		out = append(out, "`"+strings.TrimPrefix(s, "internal/")+"`")
	}
	return strings.Join(out, ", ")
}

var (
	inlineLink = regexp.MustCompile(`\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)`)
	namedLink  = regexp.MustCompile(`(?m)^\[[^\]]+\]:\s+(\S+)`)
	inlineCode = regexp.MustCompile("`[^`\n]*`")
	scheme     = regexp.MustCompile(`^[a-z][a-z0-9+.-]*:`)
	heading    = regexp.MustCompile(`(?m)^#{1,6}\s+(.+?)\s*#*$`)
	notInSlug  = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
)

// TestMarkdownLinks follows every relative link, and its anchor if it leads
// to a Markdown file.
func TestMarkdownLinks(t *testing.T) {
	for _, file := range filesBelow(t, ".", ".md") {
		text := inlineCode.ReplaceAllString(withoutCode(readText(t, file)), "")
		for _, m := range append(inlineLink.FindAllStringSubmatch(text, -1), namedLink.FindAllStringSubmatch(text, -1)...) {
			if scheme.MatchString(m[1]) {
				continue
			}
			target, anchor, _ := strings.Cut(m[1], "#")
			to := file
			if target != "" {
				to = path.Join(path.Dir(file), target)
			}
			if path.IsAbs(target) || strings.HasPrefix(to, "../") {
				t.Errorf("%s: link %q leaves the repository", file, m[1])
				continue
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: link %q leads nowhere", file, m[1])
				continue
			}
			if anchor != "" && strings.HasSuffix(to, ".md") && !slices.Contains(anchors(readText(t, to)), anchor) {
				t.Errorf("%s: %s has no heading for link %q", file, to, m[1])
			}
		}
	}
}

// anchors lists the names that the headings of a Markdown text get.
func anchors(text string) []string {
	var names []string
	seen := map[string]int{}
	for _, m := range heading.FindAllStringSubmatch(withoutCode(text), -1) {
		name := strings.ReplaceAll(notInSlug.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")
		if n := seen[name]; n > 0 {
			names = append(names, fmt.Sprintf("%s-%d", name, n))
		} else {
			names = append(names, name)
		}
		seen[name]++
	}
	return names
}

// withoutCode drops fenced blocks: what looks like a link or a heading there
// is none.
func withoutCode(text string) string {
	var b strings.Builder
	fence := ""
	for line := range strings.Lines(text) {
		trimmed := strings.TrimLeft(line, " ")
		switch {
		case fence == "" && (strings.HasPrefix(trimmed, "```") || strings.HasPrefix(trimmed, "~~~")):
			fence = trimmed[:3]
		case fence != "" && strings.HasPrefix(trimmed, fence):
			fence = ""
		case fence == "":
			b.WriteString(line)
		}
	}
	return b.String()
}

func readText(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
