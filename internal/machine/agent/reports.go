// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/wire"
)

// sendReports sends what the journal holds, oldest first, until ctx ends. A
// report leaves the journal only after the server has it; if the daemon dies
// in between, it is sent again and the key makes that harmless.
func (a *Agent) sendReports(ctx context.Context) {
	fails := 0
	for ctx.Err() == nil {
		if a.sendQueued(ctx) == nil {
			fails = 0
			select {
			case <-ctx.Done():
			case <-a.wake:
			}
			continue
		}
		// A new report does not hurry a server that is away; a check that
		// reached it does.
		fails++
		timer := time.NewTimer(backoff(fails, backoffFirst, backoffMost))
		select {
		case <-ctx.Done():
		case <-a.reached:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (a *Agent) sendQueued(ctx context.Context) error {
	for {
		queue := a.journal().Reports
		if len(queue) == 0 {
			return nil
		}
		r := queue[0]
		err := a.cfg.Server.Report(ctx, r)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && fault.KindOf(err) != fault.Invalid {
			a.log.LogAttrs(ctx, slog.LevelWarn, "report not sent", slog.String("event", string(r.Event)),
				slog.Int("queued", len(queue)), slog.String("err", err.Error()))
			return err
		}
		if err != nil {
			// The server will never take it; the history still has it.
			a.log.LogAttrs(ctx, slog.LevelError, "report refused", slog.String("event", string(r.Event)), slog.String("err", err.Error()))
		}
		err = a.update(func(j *journal) {
			j.Reports = slices.DeleteFunc(j.Reports, func(q wire.Report) bool { return q.Key == r.Key })
		})
		if err != nil {
			a.log.LogAttrs(ctx, slog.LevelError, "journal not written", slog.String("err", err.Error()))
			return err
		}
	}
}

// nudge tells sendReports that there is something new.
func (a *Agent) nudge() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// serverReached tells sendReports that a check got through.
func (a *Agent) serverReached() {
	select {
	case a.reached <- struct{}{}:
	default:
	}
}
