// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"strings"
	"testing"
	"time"
)

func TestLoadDoesEachKindOfWork(t *testing.T) {
	var out strings.Builder
	if err := load(1500*time.Millisecond, &out); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"files", "page cache", "tcp", "unix", "processes", "memory"} {
		if !strings.Contains(out.String(), kind+" ") || strings.Contains(out.String(), kind+" 0\n") {
			t.Errorf("no %s in %q", kind, out.String())
		}
	}
}

func TestLoadNoticesWhatItCannotDo(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // no shell
	var out strings.Builder
	if err := load(1500*time.Millisecond, &out); err == nil || !strings.Contains(err.Error(), "processes") {
		t.Errorf("error %v", err)
	}
}
