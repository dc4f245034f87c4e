// SPDX-License-Identifier: Apache-2.0

package compose_test

import (
	"slices"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
)

// TestHandwrittenIsInThePlan: what is compiled and what is declared are inputs.
func TestHandwrittenIsInThePlan(t *testing.T) {
	hand := func(code, declared string) *queue.Handwritten {
		return &queue.Handwritten{Fixes: []cve.ID{"CVE-2000-0001"},
			Functions: []queue.Replaced{{Name: "f", File: "a.c"}, {Name: "g", File: "a.c"}, {Name: "h", File: "b.c"}},
			Files:     []queue.SourceFile{{Name: "m.c", Content: []byte(code)}, {Name: queue.DeclaredName, Content: []byte(declared)}}}
	}
	digest := func(p compose.Plan) string {
		d, err := p.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	p := compose.NewHandwritten(catalog.Entry{}, hand("a", "b"), nil, nil, 1)
	if !slices.Equal(p.Fixes(), []cve.ID{"CVE-2000-0001"}) || !slices.Equal(p.Files(), []string{"a.c", "b.c"}) {
		t.Errorf("fixes %v, files %v", p.Fixes(), p.Files())
	}
	seen := map[string]bool{digest(p): true}
	for _, other := range []compose.Plan{
		compose.NewHandwritten(catalog.Entry{}, hand("A", "b"), nil, nil, 1),
		compose.NewHandwritten(catalog.Entry{}, hand("a", "B"), nil, nil, 1),
		compose.NewHandwritten(catalog.Entry{}, hand("a", "b"), nil, map[string]string{"source": "2"}, 1),
		{},
	} {
		if d := digest(other); seen[d] {
			t.Errorf("%+v has the digest of another plan", other.Handwritten)
		} else {
			seen[d] = true
		}
	}
	if digest(p) != digest(compose.NewHandwritten(catalog.Entry{}, hand("a", "b"), nil, nil, 9)) {
		t.Error("the sequence is in the digest")
	}
}
