// SPDX-License-Identifier: Apache-2.0

package klp

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"klatch/internal/durable"
)

// Blocker is a task that a running transition waits for.
type Blocker struct {
	PID, TID int
	Comm     string
	Kthread  bool
	State    string
	Stack    []string
}

// Limits of what Blockers tells; a stalled transition has a handful.
const (
	maxBlockers = 64
	maxStack    = 32
)

// Blockers lists the tasks whose patch_state is not what the running
// transition wants: 1 while a livepatch comes in, 0 while it goes, -1 outside
// of a transition (proc(5)). The idle tasks have no folder and are not seen.
func (k *Kernel) Blockers() ([]Blocker, error) {
	var now State
	if err := k.livepatches(&now); err != nil {
		return nil, err
	}
	target := ""
	for _, p := range now.Livepatches {
		if p.Transition {
			target = map[bool]string{true: "1", false: "0"}[p.Enabled]
		}
	}
	if target == "" {
		return nil, nil
	}
	tasks, err := filepath.Glob(filepath.Join(k.root, "proc/[1-9]*/task/[1-9]*"))
	if err != nil {
		return nil, err
	}
	var list []Blocker
	for _, t := range tasks {
		state, err := readLine(t, "patch_state")
		if gone(err) || err == nil && (state == target || state == "-1") {
			continue
		}
		if err != nil {
			return list, fmt.Errorf("look for blocking tasks: %w", err)
		}
		if len(list) == maxBlockers {
			break
		}
		list = append(list, describe(t))
	}
	return list, nil
}

// describe tells what can be read of a task that may end meanwhile; the stack
// needs CAP_SYS_ADMIN (fs/proc/base.c, proc_pid_stack) and may stay empty.
func describe(task string) Blocker {
	var b Blocker
	b.TID, _ = strconv.Atoi(filepath.Base(task))
	b.PID, _ = strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(task))))
	b.Comm, _ = readLine(task, "comm")
	stat, _ := readLine(task, "stat")
	// Fields after the name, which may hold anything: state ppid pgrp session
	// tty tpgid flags; PF_KTHREAD is 0x00200000 (include/linux/sched.h).
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) > 6 {
		b.State = f[0]
		flags, _ := strconv.ParseUint(f[6], 10, 64)
		b.Kthread = flags&0x00200000 != 0
	}
	stack, _ := readLine(task, "stack")
	for line := range strings.Lines(stack) {
		if len(b.Stack) < maxStack {
			b.Stack = append(b.Stack, strings.TrimPrefix(strings.TrimSpace(line), "[<0>] "))
		}
	}
	return b
}

func readLine(task, name string) (string, error) {
	b, err := durable.ReadFile(filepath.Join(task, name), 64<<10)
	return strings.TrimSpace(string(b)), err
}
