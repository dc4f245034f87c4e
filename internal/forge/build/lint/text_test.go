// SPDX-License-Identifier: Apache-2.0

package lint

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/queue"
)

const source = `struct thing {
	int a;
	int b;
};

static const struct ops table = {
#ifdef X
	.open = one,
#endif
	.close = two,
};

static int limit = 3;

static int __init start(void)
{
	return limit;
}

unsigned int
split_head(int a,
	   const char *name)
{
	return a;
}
EXPORT_SYMBOL_GPL(split_head);
`

func TestWhatAChangeLiesIn(t *testing.T) {
	lines := strings.Split(source, "\n")
	line := func(text string) int { return slices.Index(lines, text) + 1 }
	for _, c := range []struct {
		name string
		edit queue.Edit
		want []string
	}{
		{"a member", queue.Edit{Removed: []int{line("	int b;")}}, []string{"layout_changed struct thing"}},
		{"a member after the last", queue.Edit{Inserted: []queue.Insertion{{Before: line("	int b;") + 1, Lines: []string{"	int c;"}}}}, []string{"layout_changed struct thing"}},
		{"an entry behind a condition", queue.Edit{Removed: []int{line("	.close = two,")}}, []string{"ops_table_changed table"}},
		{"a value", queue.Edit{Removed: []int{line("static int limit = 3;")}}, []string{"data_changed limit"}},
		{"boot code", queue.Edit{Removed: []int{line("	return limit;")}}, []string{"init_code start"}},
		{"a plain function", queue.Edit{Removed: []int{line("	return a;")}}, nil},
		{"new text between", queue.Edit{Inserted: []queue.Insertion{{Before: line("unsigned int"), Lines: []string{"int more(void);"}}}}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &run{}
			r.text("p", "a.c", lines, c.edit)
			var got []string
			for _, f := range r.report.Findings {
				got = append(got, fmt.Sprintf("%s %s%s", f.Code, f.Type, f.Function))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("findings %q, want %q", got, c.want)
			}
		})
	}
}

func TestPrototypes(t *testing.T) {
	same := func(a, b string) bool {
		return exported(strings.Split(a, "\n"))["split_head"] == exported(strings.Split(b, "\n"))["split_head"]
	}
	if p := exported(strings.Split(source, "\n"))["split_head"]; p != "unsigned int split_head(int, char *)" {
		t.Errorf("prototype %q", p)
	}
	for text, want := range map[string]bool{
		strings.Replace(source, "int a,", "const int number,", 1):                   true,
		strings.Replace(source, "int a,\n	   const char *name", "int a", 1):         false,
		strings.Replace(source, "unsigned int\nsplit", "unsigned long\nsplit", 1):   false,
		strings.Replace(source, "const char *name", "const unsigned char *name", 1): false,
	} {
		if text == source {
			t.Fatal("nothing changed")
		}
		if same(source, text) != want {
			t.Errorf("same prototype: %v, want %v", !want, want)
		}
	}
}
