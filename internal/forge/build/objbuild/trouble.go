// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"errors"
	"io/fs"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/sandbox"
)

// sourceError is a complaint of gcc or clang about a place in the source:
// "file:line:column: error: text"; an #include that is not there is fatal.
var sourceError = regexp.MustCompile(`^\S+?:[0-9]+:(?:[0-9]+:)? (?:fatal )?error: `)

// sourceSays is a complaint whose words are the source's own.
var sourceSays = regexp.MustCompile(`error: (?:#error|static assertion failed|call to '.*' declared with attribute error)`)

// trouble are the words of compilers, assemblers, linkers, shells and make
// when the machine, not the source, is at fault: errno texts of the C library,
// gcc.cc and libiberty (xmalloc.c), make's job.c.
var trouble = regexp.MustCompile(strings.Join([]string{
	`[Oo]ut of memory`, `virtual memory exhausted`, `memory exhausted`, `Cannot allocate memory`, `[Cc]an't allocate`, `: (?:m|c|re)alloc$`,
	`No space left on device`, `Disk quota exceeded`, `File too large`, `File size limit exceeded`, `Input/output error`, `Read-only file system`,
	`Resource temporarily unavailable`, `Too many open files`, `[Cc]annot fork`, `vfork: `,
	`signal terminated program`, `\bKilled\b`, `\bBus error\b`, `\bSegmentation fault\b`, `\bAborted\b`, `CPU time limit exceeded`,
	`internal compiler error`, `fatal error: error (?:writing|closing)`, `error (?:writing|closing) to? ?\S*: `, `cannot execute`,
}, "|"))

// troubleIn finds the first line that says that the machine is at fault. Lines
// of source that the compiler shows, and what #error says, do not count: a fix
// could say anything there.
func troubleIn(log []byte) string {
	for line := range strings.Lines(string(log)) {
		line = strings.TrimRight(line, "\r\n")
		if strings.HasPrefix(line, " ") || sourceSays.MatchString(line) || !trouble.MatchString(line) {
			continue
		}
		if at := sourceError.FindStringIndex(line); at != nil && strings.ContainsAny(line[at[1]:], "‘'\"") {
			continue // it quotes the source
		}
		return shorten([]byte(line))
	}
	return ""
}

// notCompiled tells a fix that the compiler refuses from a build that went
// wrong by itself: a fork or an allocation that did not work, a full disk, a
// compiler that was killed or crashed. Without a complaint about the source,
// or with a sign of such trouble, it is ours.
func (j *job) notCompiled(o *object, res sandbox.Result, cause error) error {
	said := complaintsOf(res.Output)
	if !errors.Is(cause, fs.ErrNotExist) {
		return fault.New(fault.Internal, "compile", "read %s: %w", o.unit.Target, cause)
	}
	if why := troubleIn(res.Output); why != "" {
		return fault.New(fault.Unavailable, "compile", "compile %s patched: %s", o.unit.Source, why)
	}
	if !slices.ContainsFunc(said, sourceError.MatchString) {
		return fault.New(fault.Internal, "compile", "compile %s patched: %s", o.unit.Source, strings.Join(said, "\n"))
	}
	r := j.refusal("does_not_compile", o)
	r.Detail = strings.Join(said, "\n")
	j.refuse(r)
	return nil
}

// maxErrors limits how many lines of the compiler are kept.
const maxErrors = 50

// complaintsOf takes the complaints out of a build log: errors of the
// compiler, else its end.
func complaintsOf(log []byte) []string {
	var out []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "error:") && len(out) < maxErrors {
			out = append(out, strings.TrimSpace(line))
		}
	}
	if len(out) == 0 {
		return []string{shorten(log)}
	}
	return out
}
