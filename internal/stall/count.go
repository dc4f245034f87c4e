// SPDX-License-Identifier: Apache-2.0

package stall

import (
	"cmp"
	"slices"

	"klatch/internal/livepatch"
)

// Count is how many tasks held one transition up for one reason in one
// function: what the publisher learns of a stall. It names no task.
type Count struct {
	Class    Class  `json:"class"`
	Object   string `json:"object,omitempty"` // vmlinux or a module; empty with the function
	Function string `json:"function,omitempty"`
	Tasks    int    `json:"tasks"`
}

// MaxCounts limits the counts of one stall; those with the fewest tasks go.
const MaxCounts = 16

// All classifies tasks, those that a person can do the least about first.
func All(tasks []Task, replaced []livepatch.Function) []Blocked {
	bs := make([]Blocked, 0, len(tasks))
	for _, t := range tasks {
		bs = append(bs, Classify(t, replaced))
	}
	slices.SortStableFunc(bs, func(x, y Blocked) int {
		return cmp.Compare(slices.Index(Classes, x.Class), slices.Index(Classes, y.Class))
	})
	return bs
}

// CountAll counts by class and function, most tasks first. Only replaced
// functions and those that a task with another trouble sleeps in are named,
// never a stack.
func CountAll(bs []Blocked) []Count {
	var counts []Count
	for _, b := range bs {
		c := Count{Class: b.Class, Function: b.Function.Symbol}
		if c.Function != "" {
			c.Object = cmp.Or(b.Function.Module, "vmlinux")
		}
		i := slices.IndexFunc(counts, func(o Count) bool {
			return o.Class == c.Class && o.Object == c.Object && o.Function == c.Function
		})
		if i < 0 {
			i, counts = len(counts), append(counts, c)
		}
		counts[i].Tasks++
	}
	slices.SortStableFunc(counts, func(x, y Count) int { return cmp.Compare(y.Tasks, x.Tasks) })
	return counts[:min(len(counts), MaxCounts)]
}
