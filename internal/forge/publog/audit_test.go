// SPDX-License-Identifier: Apache-2.0

package publog_test

import (
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/forge/publog"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
)

// TestAFolderHoldsItsOwnLog: with two logs of one publisher, the files of one
// must not stand for the other.
func TestAFolderHoldsItsOwnLog(t *testing.T) {
	d := withLog(t)
	mustPublish(t, d, some(3))
	own, _ := openLog(t, d)
	other := logsim.New(t, "another.example.org/log", 0).Key
	if err := os.CopyFS(filepath.Join(d.Repository(), translog.Folder(other)), os.DirFS(own.Dir)); err != nil {
		t.Fatal(err)
	}
	r := audit(t, d, func(q *publog.Question) {
		a := *q.Anchor
		a.LogPolicy += "log " + other.String() + "\n"
		q.Anchor = &a
	})
	if len(r.Findings) != 1 || r.Findings[0].Code != translog.CodeOrigin || len(r.Logs) != 1 {
		t.Errorf("%d logs, findings %+v", len(r.Logs), r.Findings)
	}
}
