// SPDX-License-Identifier: Apache-2.0

package witness

import (
	"io"
	"log/slog"
	"net/http"
	"time"

	"klatch/internal/fault"
	"klatch/internal/obs"
	"klatch/internal/translog"
)

// Handler serves add-checkpoint. Whoever asks needs no credential: only a log
// can sign its checkpoints.
func (w *Witness) Handler(log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /add-checkpoint", func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, translog.MaxSubmission))
		if err != nil {
			http.Error(rw, "request is too long or was cut", http.StatusBadRequest)
			return
		}
		a, err := w.Add(body, time.Now())
		level := slog.LevelInfo
		if fault.CodeOf(err) == translog.CodeInconsistent || a.Status >= http.StatusInternalServerError {
			level = slog.LevelError
		}
		if err != nil {
			log.LogAttrs(r.Context(), level, "not cosigned", slog.Int("status", a.Status), obs.Err(err))
		} else {
			log.LogAttrs(r.Context(), level, "cosigned")
		}
		if a.Type == "" {
			a.Type = "text/plain; charset=utf-8"
		}
		if a.Body == "" {
			a.Body = string(fault.CodeOf(err)) + "\n"
		}
		rw.Header().Set("Content-Type", a.Type)
		rw.WriteHeader(a.Status)
		_, _ = io.WriteString(rw, a.Body) // the asker is gone; it asks again
	})
	return mux
}
