// SPDX-License-Identifier: Apache-2.0

package review

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/queue"
)

const source = `int first(int a)
{
	spin_lock(&l);
	a++;
	spin_unlock(&l);
	return a;
}

static int sleeper(struct q *q)
{
	wait_event(q->w, done(q));
	return 0;
}
`

func TestLook(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, from, to string
		want           []string
	}{
		{"nothing special", "	a++;", "	a += 2;", nil},
		{"a lock goes", "	spin_lock(&l);\n", "", []string{"lock_changed first"}},
		{"a lock of another kind", "	spin_lock(&l);", "	spin_lock_bh(&l);", []string{"lock_changed first"}},
		{"a new wait", "	a++;", "	msleep(a++);", []string{"new_wait first"}},
		{"another return value", "	return a;", "	return -EINVAL;", []string{"return_changed first"}},
		{"a sleeper", "	return 0;", "	q++; return 0;", []string{"sleeps sleeper"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := strings.Replace(source, c.from, c.to, 1)
			if now == source {
				t.Fatal("nothing changed")
			}
			other := t.TempDir()
			if err := os.WriteFile(filepath.Join(other, "a.c"), []byte(now), 0o644); err != nil {
				t.Fatal(err)
			}
			diff, err := queue.Change(t.Context(), dir, other, []string{"a.c"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range Look(dir, []queue.Patch{{Name: "p", Files: []string{"a.c"}, Diff: diff}}) {
				got = append(got, string(f.Code)+" "+f.Function)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("findings %q, want %q", got, c.want)
			}
			twice := Look(dir, []queue.Patch{{Name: "p", Files: []string{"a.c"}, Diff: diff}, {Name: "q", Files: []string{"a.c"}, Diff: diff}})
			if !slices.ContainsFunc(twice, func(f Finding) bool { return f.Code == "merged" }) {
				t.Errorf("two patches of one function: %+v", twice)
			}
		})
	}
}
