// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

const schemaFile = "../../docs/reference/status.schema.json"

func schema(t *testing.T, part string) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	s, err := c.Compile(schemaFile + part)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func validate(t *testing.T, s *jsonschema.Schema, text []byte) error {
	t.Helper()
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(v)
}

// TestStatusKeepsItsSchema: what status --json prints, and every state that
// the agent can be in, is what the published schema promises.
func TestStatusKeepsItsSchema(t *testing.T) {
	whole := schema(t, "")
	for _, name := range []string{"status-patched-json", "status-fresh-json", "status-dead-json", "status-stalled-json", "status-quarantine-json", "status-halted-json"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		_, text, _ := bytes.Cut(b, []byte("\n")) // the command's line
		if err := validate(t, whole, text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// The schema is strict: a member that it does not know is refused.
		if err := validate(t, whole, bytes.Replace(text, []byte(`"act"`), []byte(`"more": 1, "act"`), 1)); err == nil {
			t.Errorf("%s: an unknown member passes", name)
		}
	}
	state := schema(t, "#/$defs/state")
	files, err := filepath.Glob("../../internal/machine/agent/testdata/state/*.json")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d state files, %v", len(files), err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate(t, state, b); err != nil {
			t.Errorf("%s: %v", strings.TrimSuffix(filepath.Base(f), ".json"), err)
		}
	}
}
