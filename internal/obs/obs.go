// SPDX-License-Identifier: Apache-2.0

// Package obs sets up logging and owns the names of its attributes: the same
// words as in the glossary, in JSON and in SQL columns. Loggers are handed in;
// nothing here is global.
package obs

import (
	"io"
	"log/slog"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/wire"
)

// NewJournal logs text for a machine's journal, which adds the time itself.
func NewJournal(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

// NewJSON logs one JSON object per line, for servers.
func NewJSON(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}

// MachineID names a machine.
func MachineID(id string) slog.Attr { return slog.String("machine_id", id) }

// BuildID names a kernel build.
func BuildID(b kernel.Build) slog.Attr { return slog.String("build_id", b.ID.String()) }

// Sequence names a livepatch of a kernel build.
func Sequence(s livepatch.Sequence) slog.Attr { return slog.Uint64("sequence", uint64(s)) }

// Phase is where a machine is on its journey.
func Phase(p wire.Phase) slog.Attr { return slog.String("phase", string(p)) }

// CVE names a vulnerability.
func CVE(id cve.ID) slog.Attr { return slog.String("cve_id", string(id)) }

// Err is an error with its kind and code.
func Err(err error) slog.Attr {
	if err == nil {
		return slog.Attr{}
	}
	attrs := []any{slog.String("text", err.Error()), slog.String("kind", string(fault.KindOf(err)))}
	if c := fault.CodeOf(err); c != "" {
		attrs = append(attrs, slog.String("code", string(c)))
	}
	return slog.Group("err", attrs...)
}
