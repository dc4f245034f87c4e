// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestChangesOfTwoHeadersAreToldApart: a name that one header changes means
// nothing to those who only include the other.
func TestChangesOfTwoHeadersAreToldApart(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{
		"include/a.h": "static inline int a(void)\n{\n\treturn 1;\n}\n",
		"include/b.h": "static inline int b(void)\n{\n\treturn 1;\n}\n",
	}
	var units []string
	for i := range few + 1 {
		files[fmt.Sprintf("a%d.c", i)] = "#include <a.h>\nint b;\n"
		files[fmt.Sprintf("b%d.c", i)] = "#include <b.h>\nint a;\n"
	}
	files["a0.c"] = "#include <a.h>\nint f(void) { return a(); }\n"
	files["b0.c"] = "#include <b.h>\nint f(void) { return b(); }\n"
	for name, text := range files {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if filepath.Ext(name) == ".c" {
			units = append(units, name)
		}
	}
	g, err := Load(dir, filepath.Join(t.TempDir(), "graph.json"), units)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := g.Affected([]Change{edit("include/a.h", 3, false, []string{"\treturn 2;"}), edit("include/b.h", 3, false, []string{"\treturn 2;"})})
	if err != nil || !slices.Equal(got, []string{"a0.c", "b0.c"}) {
		t.Errorf("affected %v, %v", got, err)
	}
}
