// SPDX-License-Identifier: Apache-2.0

package audit_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"klatch/internal/server/audit"
)

func TestLinesFollowEachOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if e, broken, err := audit.Open(path).Last(5); len(e) != 0 || broken != 0 || err != nil {
		t.Errorf("no file: %v, %d, %v", e, broken, err)
	}
	var wg sync.WaitGroup
	l := audit.Open(path)
	for i := range 20 {
		wg.Go(func() {
			if err := l.Append(audit.Entry{Who: "anna", What: "hold", Tier: fmt.Sprint(i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := audit.Open(path).Append(audit.Entry{What: "release", Before: []byte(`{"hold":true}`)}); err != nil {
		t.Fatal(err)
	}
	e, broken, err := audit.Open(path).Last(5)
	if err != nil || broken != 0 || len(e) != 5 || e[0].What != "release" || string(e[0].Before) != `{"hold":true}` || e[1].What != "hold" {
		t.Errorf("%+v, %d, %v", e, broken, err)
	}
}

func TestChangedLinesShow(t *testing.T) {
	for name, change := range map[string]func([][]byte) [][]byte{
		"one is taken out": func(l [][]byte) [][]byte { return append(l[:2:2], l[3:]...) },
		"one is changed": func(l [][]byte) [][]byte {
			l[2] = bytes.Replace(l[2], []byte("anna"), []byte("otto"), 1)
			return l
		},
		"two are swapped": func(l [][]byte) [][]byte { l[1], l[2] = l[2], l[1]; return l },
		"one is put in":   func(l [][]byte) [][]byte { return append([][]byte{l[0]}, l...) },
		"one is scraps":   func(l [][]byte) [][]byte { l[1] = []byte("{\n"); return l },
	} {
		path := filepath.Join(t.TempDir(), "audit.log")
		for range 5 {
			if err := audit.Open(path).Append(audit.Entry{Who: "anna", What: "promote"}); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b = bytes.Join(change(bytes.SplitAfter(bytes.TrimSuffix(b, nil), []byte("\n"))), nil)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, broken, err := audit.Open(path).Last(5); err != nil || broken == 0 {
			t.Errorf("%s: %d broken, %v", name, broken, err)
		}
	}
}

// A crash in the middle of a write leaves half a line; the next one begins on
// its own.
func TestTornLineIsNotContinued(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := audit.Open(path).Append(audit.Entry{What: "hold"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"at":"20`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := audit.Open(path).Append(audit.Entry{What: "release"}); err != nil {
		t.Fatal(err)
	}
	e, broken, err := audit.Open(path).Last(5)
	if err != nil || broken == 0 || len(e) != 2 || e[0].What != "release" {
		t.Errorf("%+v, %d, %v", e, broken, err)
	}
}
