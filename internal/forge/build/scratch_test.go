// SPDX-License-Identifier: Apache-2.0

package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

const scratchEnv = "KLATCH_TEST_SCRATCH"

// TestMain makes this program a run that is killed while it has a folder.
func TestMain(m *testing.M) {
	if parent := os.Getenv(scratchEnv); parent != "" {
		dir, _, err := Scratch(parent, "run-")
		if err != nil {
			os.Exit(1)
		}
		_, _ = os.Stdout.WriteString(dir + "\n")
		_, _ = os.Stdin.Read(make([]byte, 1))
	}
	os.Exit(m.Run())
}

func TestFoldersOfKilledRunsAreRemovedAndOthersKept(t *testing.T) {
	parent := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), scratchEnv+"="+parent)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := out.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	theirs := strings.TrimSpace(string(b[:n]))
	if err := os.WriteFile(filepath.Join(theirs, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	mine, remove, err := Scratch(parent, "run-")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(theirs); err != nil {
		t.Errorf("the folder of a living run is gone: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := os.Mkdir(filepath.Join(parent, "stranger"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, removeOther, err := Scratch(parent, "run-")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(theirs); err == nil {
		t.Error("the folder of a killed run is still there")
	}
	if _, err := os.Stat(mine); err != nil {
		t.Errorf("my own folder is gone: %v", err)
	}
	remove()
	removeOther()
	if left, _ := os.ReadDir(parent); len(left) != 1 || left[0].Name() != "stranger" {
		t.Errorf("left: %v", left)
	}
}

func TestRunsSideBySideKeepTheirFolders(t *testing.T) {
	parent := t.TempDir()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				dir, remove, err := Scratch(parent, "run-")
				if err != nil {
					t.Error(err)
					return
				}
				if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o644); err != nil {
					t.Error(err)
				}
				remove()
			}
		})
	}
	wg.Wait()
}
