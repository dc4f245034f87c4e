// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"testing"

	"klatch/internal/stall"
)

func TestParseBlockers(t *testing.T) {
	got := parseBlockers("noise\ntask 96 97\n97 (cat) S 94 94 89 0 -1 4194304 63\n[<0>] wait_for_partner+0x63/0x110\n[<0>] fifo_open+0x2bb/0x310\n" +
		"task 30 30\n30 (task 1 2) S 2 0 0 0 -1 2097216 0\ntask 5 5\n[<0>] msleep+0x1/0x2\ntask 6 6\n")
	if len(got) != 4 || got[0].PID != 96 || got[0].TID != 97 || got[0].Comm != "cat" || len(got[0].Stack) != 2 ||
		got[1].Comm != "task 1 2" || !got[1].Kthread || got[2].State != "" || len(got[2].Stack) != 1 || got[3].TID != 6 {
		t.Errorf("got %+v", got)
	}
}

func FuzzParseBlockers(f *testing.F) {
	f.Add("task 96 97\n97 (cat) S 94 94 89 0 -1 4194304 63\n[<0>] fifo_open+0x2bb/0x310\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, task := range parseBlockers(text) {
			if task.TID <= 0 {
				t.Errorf("a task without a number: %+v", task)
			}
			stall.Classify(task, nil)
		}
	})
}
