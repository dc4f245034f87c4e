// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"klatch/internal/livepatch"
	"klatch/internal/stall"
	"klatch/internal/tracer"
)

// lookForBlockers prints, for each task that the transition of livepatch $1
// waits for, a line "task PID TID" and what /proc says of it. The idle tasks
// have no folder and are not seen.
const lookForBlockers = `cd /sys/kernel/livepatch/$1 || exit 3
read -r running < transition || exit 3
[ "$running" = 1 ] || exit 0
read -r target < enabled || exit 3
for t in /proc/[0-9]*/task/[0-9]*; do
	read -r state < $t/patch_state || continue
	case $state in "$target"|-1) continue ;; esac
	p=${t#/proc/}
	echo task ${p%%/*} ${t##*/}
	cat $t/stat $t/stack
done 2>/dev/null
exit 0`

// Blockers are the tasks that the transition of a livepatch in a guest waits
// for, with the reason, the worst first; none where no transition runs.
// replaced are the functions that the livepatch replaces.
func Blockers(ctx context.Context, g Guest, module string, replaced []livepatch.Function) ([]stall.Blocked, error) {
	res, err := g.Run(ctx, Command{Argv: []string{"sh", "-c", lookForBlockers, "sh", module}})
	if err != nil {
		return nil, err
	}
	if res.Exit != 0 || res.Truncated || res.TimedOut {
		return nil, Failf("look who blocks the transition of %s: exit status %d: %s", module, res.Exit, strings.TrimSpace(string(res.Stderr)))
	}
	return stall.All(parseBlockers(string(res.Stdout)), replaced), nil
}

// parseBlockers reads what lookForBlockers prints. A task that ended meanwhile
// has nothing but its line.
func parseBlockers(text string) (tasks []stall.Task) {
	var pid, tid int
	var about []string
	finish := func() {
		if tid > 0 {
			stat, stack := "", about
			if len(about) > 0 && !strings.HasPrefix(about[0], "[<") {
				stat, stack = about[0], about[1:]
			}
			tasks = append(tasks, stall.ParseTask(pid, tid, stat, stack))
		}
		pid, tid, about = 0, 0, nil
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		words := strings.Fields(line)
		if len(words) == 3 && words[0] == "task" {
			p, perr := strconv.Atoi(words[1])
			t, terr := strconv.Atoi(words[2])
			if perr == nil && terr == nil {
				finish()
				pid, tid = p, t
				continue
			}
		}
		about = append(about, line)
	}
	finish()
	return tasks
}

// The two lists that package tracer reads, in its order.
var tracerLists = []string{"/sys/kernel/debug/kprobes/list", "/sys/kernel/tracing/enabled_functions"}

// Tracers finds who else is attached to functions in a guest, before a
// livepatch that replaces them is loaded. already are those that a livepatch
// in the guest replaces now.
func Tracers(ctx context.Context, g Guest, functions, already []livepatch.Function) ([]tracer.Tracer, error) {
	res, err := g.Run(ctx, Command{Argv: append([]string{"cat"}, tracerLists...)})
	if err != nil {
		return nil, err
	}
	if res.Exit != 0 || res.Truncated {
		return nil, &BrokenError{What: "look for tracers in the guest", Err: fmt.Errorf("exit status %d: %s", res.Exit, strings.TrimSpace(string(res.Stderr)))}
	}
	return tracer.Find(string(res.Stdout), functions, already), nil
}
