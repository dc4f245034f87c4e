// SPDX-License-Identifier: Apache-2.0

// Package logsim is a transparency log with its witnesses for tests, in memory.
// It holds all keys, so it can sign what no honest log or witness would: two
// histories, fewer witnesses, another origin. The real log is package publog.
// Tests only.
package logsim

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/translog"
)

// Log is one log. Entries may be changed at will.
type Log struct {
	Origin    string
	Signer    note.Signer
	Key       *translog.Verifier
	Witnesses []translog.Secret
	Entries   []translog.Entry
	t         testing.TB
}

// Secret makes a note signer key.
func Secret(t testing.TB, name string) string {
	t.Helper()
	s, _, err := note.GenerateKey(rand.Reader, name)
	check(t, err)
	return s
}

// New makes a log with witnesses.
func New(t testing.TB, origin string, witnesses int) *Log {
	t.Helper()
	l := &Log{Origin: origin, t: t}
	l.UseKey(Secret(t, origin))
	for i := range witnesses {
		w, err := translog.ParseSecret(Secret(t, fmt.Sprintf("witness.example/w%d", i+1)))
		check(t, err)
		l.Witnesses = append(l.Witnesses, w)
	}
	return l
}

// UseKey changes the log's key.
func (l *Log) UseKey(secret string) {
	l.t.Helper()
	var err error
	l.Signer, err = note.NewSigner(secret)
	check(l.t, err)
	s, err := translog.ParseSecret(secret)
	check(l.t, err)
	l.Key = s.Log()
}

// Fork is a second log with the same keys and, so far, the same entries.
func (l *Log) Fork() *Log {
	c := *l
	c.Entries = slices.Clone(l.Entries)
	return &c
}

// Policy asks for so many of the witnesses.
func (l *Log) Policy(need int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "log %s\n", l.Key)
	var names []string
	for i, w := range l.Witnesses {
		names = append(names, fmt.Sprintf("w%d", i+1))
		fmt.Fprintf(&b, "witness w%d %s\n", i+1, w.Witness())
	}
	if need == 0 {
		return b.String() + "quorum none\n"
	}
	return b.String() + fmt.Sprintf("group all-of-them %d %s\nquorum all-of-them\n", need, strings.Join(names, " "))
}

// Add appends an entry and returns its index.
func (l *Log) Add(target string, content []byte) int64 {
	l.Entries = append(l.Entries, translog.EntryOf(target, content))
	return int64(len(l.Entries)) - 1
}

// Sign makes a checkpoint of any text.
func (l *Log) Sign(body string) []byte {
	l.t.Helper()
	b, err := note.Sign(&note.Note{Text: body}, l.Signer)
	check(l.t, err)
	return b
}

// Whole is the log with its newest checkpoint, without cosignatures.
func (l *Log) Whole() *translog.Log {
	l.t.Helper()
	w, err := translog.Build(l.Origin, l.Entries, func(body string) ([]byte, error) { return l.Sign(body), nil })
	check(l.t, err)
	return w
}

// Cosign adds the cosignatures of witnesses, counted from 0.
func (l *Log) Cosign(signed []byte, which ...int) []byte {
	text, _, _ := bytes.Cut(signed, []byte("\n\n"))
	for i, w := range which {
		signed = append(slices.Clone(signed), l.Witnesses[w].Cosign(string(text)+"\n", time.Now().Add(time.Duration(i)*time.Second))...)
	}
	return signed
}

// Proof is the proof of an entry under the newest checkpoint, cosigned.
func (l *Log) Proof(index int64, which ...int) translog.Proof {
	l.t.Helper()
	w := l.Whole()
	p, err := w.Prove(index, l.Cosign(w.Checkpoint.Signed, which...))
	check(l.t, err)
	return p
}

// Files are the log's static files, named as in a repository.
func (l *Log) Files() map[string][]byte {
	l.t.Helper()
	files, err := l.Whole().Files()
	check(l.t, err)
	out := map[string][]byte{}
	for _, f := range files {
		out[filepath.Join(translog.Folder(l.Key), f.Name)] = f.Content
	}
	return out
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
