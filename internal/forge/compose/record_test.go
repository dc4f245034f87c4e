// SPDX-License-Identifier: Apache-2.0

package compose_test

import (
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
)

func recorded(t *testing.T, p compose.Plan) string {
	t.Helper()
	b, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestARecordedPlanHasTheSameDigest(t *testing.T) {
	e := catalog.Entry{Release: "6.1.0-50-cloud-amd64", Distro: "debian-12", Arch: "amd64", BuildID: [20]byte{1}, Series: "debian-6.1", Packages: map[string]string{"a": "1 x"}, StructSizes: map[string]int{"S": 8}}
	diff := []byte("--- a/net/x.c\n+++ b/net/x.c\n@@ -1,1 +1,1 @@\n-a\xff\n+b\n")
	patched, err := compose.New(e, []queue.Patch{{Name: "p", Fixes: []cve.ID{"CVE-2026-0001"}, Author: "alice", Origin: "o", Diff: diff, Files: []string{"net/x.c"}}},
		map[string]string{"tool": "1"}, 3)
	if err != nil {
		t.Fatal(err)
	}
	hand, err := queue.ParseHandwritten([]queue.SourceFile{{Name: "fix.c", Content: []byte("int x;\n")}, {Name: queue.DeclaredName,
		Content: []byte("fixes = [\"CVE-2026-0001\"]\nauthor = \"alice\"\n[[function]]\nobject = \"vmlinux\"\nname = \"f\"\nfile = \"a/b.c\"\n")}})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]compose.Plan{"source patches": patched, "hand-written": compose.NewHandwritten(e, hand, nil, nil, 3)} {
		back, err := compose.ParseRecord([]byte(recorded(t, p)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want, err := p.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := back.Digest(); err != nil || got != want || back.Sequence != 3 {
			t.Errorf("%s: digest %s, want %s, %v", name, got, want, err)
		}
		if back.Handwritten != nil && back.Handwritten.Author != "alice" || back.Handwritten == nil && back.Patches[0].Author != "alice" {
			t.Errorf("%s: the author is lost", name)
		}
	}
	good := recorded(t, patched)
	for name, bad := range map[string]string{
		"no JSON":          "x",
		"another form":     strings.Replace(good, "klatch-plan-record/1", "klatch-plan-record/2", 1),
		"an unknown field": strings.Replace(good, `"tools"`, `"trick": 1, "tools"`, 1),
		"nothing to build": recorded(t, compose.Plan{Kernel: e}),
	} {
		if _, err := compose.ParseRecord([]byte(bad)); fault.CodeOf(err) != "bad_plan" {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A second builder runs patch(1) over what somebody else wrote.
	for _, d := range []string{"--- a/../x\n+++ b/../x\n@@ -1,1 +1,1 @@\n-a\n+b\n", "1d\n" + string(diff)} {
		p := patched
		p.Patches = []queue.Patch{{Name: "p", Fixes: []cve.ID{"CVE-2026-0001"}, Diff: []byte(d)}}
		if _, err := compose.ParseRecord([]byte(recorded(t, p))); err == nil {
			t.Errorf("%q was taken", d)
		}
	}
}
