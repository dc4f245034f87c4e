// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/forge/kerneltree"
)

// Modules compiles fixtures of folder lab of the project, such as
// "livepatches/ok", for a kernel, and gives the path of each module by its
// name. The kernel's own tree stays as it is.
func Modules(t testing.TB, k Kernel, folders ...string) map[string]string {
	t.Helper()
	tree := kerneltree.At(OtherCache(t, k, nil), k.Entry).Source()
	out := t.TempDir()
	built := map[string]string{}
	for _, folder := range folders {
		here := "klatch-fixture-" + filepath.Base(folder)
		if err := os.CopyFS(filepath.Join(tree, here), os.DirFS(filepath.Join(root(t), "lab", folder))); err != nil {
			t.Fatal(err)
		}
		argv := kerneltree.Make(k.Entry, "M="+here, "modules")
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
		cmd.Dir = tree
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", folder, err, out)
		}
		found, err := filepath.Glob(filepath.Join(tree, here, "*.ko"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: modules %v, %v", folder, found, err)
		}
		name := filepath.Base(found[0])
		built[strings.TrimSuffix(name, ".ko")] = filepath.Join(out, name)
		if msg, err := exec.CommandContext(t.Context(), "strip", "--strip-debug", "-o", filepath.Join(out, name), found[0]).CombinedOutput(); err != nil {
			t.Fatalf("strip %s: %v\n%s", name, err, msg)
		}
	}
	return built
}

// root is the project's folder: the nearest with a go.mod above the package
// under test.
func root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the test")
		}
		dir = filepath.Dir(dir)
	}
}
