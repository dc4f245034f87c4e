// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const source = `package p

func refuse(code string) error { return nil }

func F(a, b int, s string) error {
	if a > 1 || b > 2 && a > 0 {
		return refuse("too_large")
	}
	if a == 7 {
		return nil
	}
	switch {
	case s == "x", s == "y":
		return refuse("bad_word")
	case b == 3:
	}
	return nil
}
`

func TestFindsTheConditionsOfRefusals(t *testing.T) {
	ms, err := mutants("p.go", []byte(source))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range ms {
		got = append(got, m.code+": "+m.text)
	}
	if s := strings.Join(got, "; "); s != `too_large: a > 1; too_large: b > 2 && a > 0; bad_word: s == "x"; bad_word: s == "y"` {
		t.Errorf("%s", s)
	}
}

// TestTellsKilledFromSurvived: one test misses its check, nothing misses the
// other.
func TestTellsKilledFromSurvived(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"go.mod": "module p\n\ngo 1.26\n",
		"p.go":      "package p\n\nimport \"errors\"\n\nfunc F(a, b int) error {\n\tif a > 1 || b > 1 {\n\t\treturn errors.New(\"no\")\n\t}\n\treturn nil\n}\n",
		"p_test.go": "package p\n\nimport \"testing\"\n\nfunc TestF(t *testing.T) {\n\tif F(2, 0) == nil {\n\t\tt.Error(\"taken\")\n\t}\n}\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	if n, err := run(".", nil); n != 1 || err != nil {
		t.Errorf("%d survived, %v", n, err)
	}
}
