// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/stall"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

// Blocking is a task that kept the last transition from finishing, and why.
type Blocking struct {
	PID      int         `json:"pid"`
	TID      int         `json:"tid"`
	Name     string      `json:"name"`
	Kthread  bool        `json:"kernel_thread"`
	State    string      `json:"state"` // one letter, proc(5); empty where it was gone
	Class    stall.Class `json:"class"`
	Object   string      `json:"object,omitempty"` // of the function: vmlinux or a module
	Function string      `json:"function,omitempty"`
}

// maxBlocking limits the tasks that are named; all are counted.
const maxBlocking = 20

// codeDeadline is the reason of a stall in which no task was named.
const codeDeadline fault.Code = "deadline"

// obstacles is why a transition did not finish.
type obstacles struct {
	code     fault.Code
	text     string
	blocking []Blocking
	counts   []stall.Count
}

// inTheWay asks who keeps the running transition from finishing. Not knowing
// does not keep it from being canceled.
func (a *Agent) inTheWay(ctx context.Context) obstacles {
	list, err := a.cfg.Loader.Blockers(ctx)
	if err != nil {
		return obstacles{code: codeDeadline, text: "the blocking tasks could not be listed: " + err.Error()}
	}
	replaced, err := a.cfg.Machine.Replaced()
	if err != nil {
		a.log.LogAttrs(ctx, slog.LevelWarn, "replaced functions not readable", slog.String("err", err.Error()))
	}
	var tasks []stall.Task
	for _, b := range list {
		tasks = append(tasks, stall.ParseTask(b.PID, b.TID, b.Stat, b.Stack))
	}
	return explain(stall.All(tasks, replaced))
}

// explain names the tasks, the worst first, and counts all of them.
func explain(bs []stall.Blocked) obstacles {
	if len(bs) == 0 {
		return obstacles{code: codeDeadline, text: "no task was named"}
	}
	o := obstacles{code: fault.Code(bs[0].Class), counts: stall.CountAll(bs)}
	var lines []string
	for _, b := range bs[:min(len(bs), maxBlocking)] {
		lines = append(lines, b.String())
		t := Blocking{PID: b.PID, TID: b.TID, Name: b.Comm, Kthread: b.Kthread, State: b.State, Class: b.Class, Function: b.Function.Symbol}
		if t.Function != "" {
			t.Object = cmp.Or(b.Function.Module, "vmlinux")
		}
		o.blocking = append(o.blocking, t)
	}
	if more := len(bs) - maxBlocking; more > 0 {
		lines = append(lines, "and "+count(more, "other", "others"))
	}
	o.text = strings.Join(lines, "\n")
	return o
}

// tracers looks, before a load, who else is attached to the functions that the
// livepatch replaces. text says why if that cannot be known: the kernel itself
// refuses what cannot be.
func (a *Agent) tracers(ctx context.Context, w work) (found []tracer.Tracer, text string) {
	found, err := a.findTracers(ctx, w)
	if err != nil {
		a.log.LogAttrs(ctx, slog.LevelWarn, "tracers not looked for", slog.Any("sequence", w.Sequence), slog.String("err", err.Error()))
		return nil, "tracers on its functions were not looked for: " + err.Error()
	}
	return found, ""
}

func (a *Agent) findTracers(ctx context.Context, w work) ([]tracer.Tracer, error) {
	b, err := durable.ReadFile(a.stagePath(w.Sequence, manifestExt), livepatch.MaxManifest)
	if err != nil {
		return nil, err
	}
	anchor, err := a.cfg.Anchor()
	if err != nil {
		return nil, err
	}
	m, err := anchor.OpenManifest(b)
	if err != nil {
		return nil, err
	}
	already, err := a.cfg.Machine.Replaced()
	if err != nil {
		return nil, err
	}
	asking, cancel := context.WithTimeout(ctx, loaderPatience)
	defer cancel()
	listing, err := a.cfg.Loader.Tracers(asking)
	if err != nil {
		return nil, err
	}
	return tracer.Find(listing, m.Functions, already), nil
}

// codeHeld is the reason why a staged livepatch waits for a tracer to go.
const codeHeld fault.Code = "tracer_in_the_way"

// held waits for tracers to go with which the kernel would refuse the load. It
// tells the server when they come or change, not each time that it looks.
func (a *Agent) held(w work, found []tracer.Tracer) error {
	var lines []string
	for _, t := range found {
		lines = append(lines, t.String())
	}
	text := strings.Join(lines, "\n")
	now := time.Now()
	err := a.update(func(j *journal) {
		j.Work.Busy++
		j.Work.After = now.Add(backoff(j.Work.Busy, backoffFirst, backoffMost)).UTC()
		j.Work.Code, j.Work.Text, j.Work.Tracers = codeHeld, text, found
	})
	if err != nil || w.Code == codeHeld && slices.Equal(w.Tracers, found) {
		return err
	}
	return a.note(note{event: wire.EventRefused, sequence: w.Sequence, code: codeHeld, text: text, tracers: found})
}
