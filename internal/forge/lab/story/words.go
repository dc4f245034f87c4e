// SPDX-License-Identifier: Apache-2.0

package story

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Word is one argument of a command: text and variables.
type Word []Part

// Part is a piece of a word: the name of a variable, or text.
type Part struct{ Variable, Text string }

// Fill puts the values of the variables in.
func (w Word) Fill(value func(name string) string) string {
	var b strings.Builder
	for _, p := range w {
		if p.Variable != "" {
			b.WriteString(value(p.Variable))
			continue
		}
		b.WriteString(p.Text)
	}
	return b.String()
}

// String shows variables as they were written.
func (w Word) String() string {
	return w.Fill(func(name string) string { return "${" + name + "}" })
}

// plain is the text of a word without variables.
func (w Word) plain() (string, bool) {
	for _, p := range w {
		if p.Variable != "" {
			return "", false
		}
	}
	return w.String(), true
}

var variableStart = regexp.MustCompile(`^\$\{([A-Z][A-Z0-9_]*)\}`)

// split cuts a line into words as a shell does: blanks between words, '...'
// as it stands, "..." with \" and \\, a backslash before one character
// outside of quotes, ${NAME} outside of '...', and # at the start of a word for a comment.
func split(line string) ([]Word, error) {
	var words []Word
	var word Word
	var text strings.Builder
	begun, quoted := false, false
	flush := func() {
		if text.Len() > 0 {
			word = append(word, Part{Text: text.String()})
			text.Reset()
		}
	}
	end := func() {
		flush()
		if begun {
			words = append(words, word)
		}
		word, begun = nil, false
	}
	for i := 0; i < len(line); i++ {
		c := line[i]
		if c == '$' {
			if m := variableStart.FindStringSubmatch(line[i:]); m != nil {
				flush()
				word, begun = append(word, Part{Variable: m[1]}), true
				i += len(m[0]) - 1
				continue
			}
		}
		switch {
		case c == '"':
			quoted, begun = !quoted, true
		case quoted && c == '\\' && i+1 < len(line) && (line[i+1] == '"' || line[i+1] == '\\'),
			!quoted && c == '\\' && i+1 < len(line):
			i++
			text.WriteByte(line[i])
			begun = true
		case quoted:
			text.WriteByte(c)
		case c == '\'':
			n := strings.IndexByte(line[i+1:], '\'')
			if n < 0 {
				return nil, errors.New("a quote that does not end")
			}
			text.WriteString(line[i+1 : i+1+n])
			begun = true
			i += n + 1
		case c == ' ' || c == '\t':
			end()
		case c == '#' && !begun:
			i = len(line)
		default:
			text.WriteByte(c)
			begun = true
		}
	}
	if quoted {
		return nil, errors.New("a quote that does not end")
	}
	end()
	if len(words) > maxWords {
		return nil, fmt.Errorf("%d words, limit %d", len(words), maxWords)
	}
	return words, nil
}
