// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"slices"
	"strings"
	"testing"
)

const confinedText = `
struct other { int x; };
struct desc {
	struct file *fp;
	int id;
};

static int fill(const int id, struct desc *d);

static int fill(const int id, struct desc *d)
{
	d->fp = get(id);
	return check(d->fp, id);
}

static void drop(struct desc *d)
{
	put(d->fp);
}

static int deep(struct desc *d, int more)
{
	if (more)
		drop(d);
	return d->id;
}

static int op(int id)
{
	struct desc d;
	int err;

	err = fill(id, &d);
	if (err)
		return err;
	err = deep(&d, d.id + 1);
	drop(&d);
	return err;
}

static int other_op(int id)
{
	struct desc mine = { .id = id };
	struct other *o = id ? get_other() : 0;

	o->mine = 3;
	fill(id, &mine);
	return mine.id + op(id);
}

const struct ops ops = { .op = op, .other = other_op };
`

func TestConfine(t *testing.T) {
	c, why := Confine(confinedText, "desc")
	if why != "" {
		t.Fatalf("refused: %s", why)
	}
	if !slices.Equal(c.Births, []string{"op", "other_op"}) || !slices.Equal(c.Users["op"], []string{"other_op"}) || len(c.Users["other_op"]) != 0 {
		t.Errorf("births %v, users %v", c.Births, c.Users)
	}
	const at = "static int op(int id)\n{\n\tstruct desc d;\n\tint err;\n\n"
	for _, c := range []struct{ name, old, text string }{
		{"a static variable", "static void drop(", "static struct desc last;\nstatic void drop("},
		{"a static variable of a function", "\tstruct desc d;", "\tstatic struct desc d;"},
		{"a pointer to itself", "\tint id;\n};", "\tstruct desc *next;\n};"},
		{"a member of another struct", "{ int x; }", "{ struct desc x; }"},
		{"a pointer in another struct", "{ int x; }", "{ struct desc *x; }"},
		{"a table of them", "struct desc mine = { .id = id }", "struct desc mine[2] = { { .id = id } }"},
		{"a variable that points to one", at, at + "\tstruct desc *p = &d;\n"},
		{"an allocation", at, at + "\tkeep(kmalloc(sizeof(struct desc), GFP_KERNEL));\n"},
		{"a size", at, at + "\tkeep(kmalloc(sizeof(d), GFP_KERNEL));\n"},
		{"a cast", at, at + "\tuse(((struct desc *)global)->id);\n"},
		{"its address to a function of another file", at, at + "\tkeep(&d);\n"},
		{"its address in another variable", at, at + "\tvoid *p = &d;\n"},
		{"its address given back", "\treturn d->id;", "\treturn (long)d;"},
		{"its address kept", "\treturn d->id;", "\tglobal = d;\n\treturn d->id;"},
		{"its address to the wrong parameter", "\tdrop(&d);\n\treturn err;", "\tfill(&d, &d);\n\treturn err;"},
		{"a function that is not static", "static void drop(", "void drop("},
		{"a function in a table", ".other = other_op", ".other = other_op, .drop = drop"},
		{"a function whose address is given away", at, at + "\tcall_later(drop);\n"},
		{"a function that gives it back", "static void drop(struct desc *d)", "static struct desc *drop(struct desc *d)"},
		{"a parameter that is a function of it", "deep(struct desc *d, int more)", "deep(struct desc *d, int (*more)(struct desc *))"},
		{"its copy", at, at + "\tglobal = d;\n"},
		{"typeof", at, at + "\ttypeof(d) *p = global;\n"},
		{"a macro that names it", "static void drop(", "#define DESC struct desc\nstatic void drop("},
		{"a macro that uses the variable", "static void drop(", "#define KEEP() keep(&mine)\nstatic void drop("},
		{"a typedef", "static void drop(", "typedef struct desc desc_t;\nstatic void drop("},
		{"a variable with the definition", "\tint id;\n};", "\tint id;\n} last;"},
		{"a function that a macro makes", "static int op(int id)\n{", "SYSCALL_DEFINE1(op, int, id)\n{"},
		{"a macro's argument", "\tdrop(&d);\n\treturn err;", "\tlist_for_each(&d, x)\n\t\tput(x);\n\treturn err;"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if strings.Count(confinedText, c.old) < 1 {
				t.Fatalf("%q is not in the text", c.old)
			}
			if got, why := Confine(strings.Replace(confinedText, c.old, c.text, 1), "desc"); why == "" {
				t.Errorf("let through: %+v", got)
			}
		})
	}
	if _, why := Confine(confinedText, "absent"); why == "" {
		t.Error("a struct that is not there was let through")
	}
	if _, why := Confine("int f(void)\n{\n\tstruct desc { int x; } d;\n\treturn d.x;\n}\n", "desc"); why == "" {
		t.Error("a struct of a function was let through")
	}
	c, why = Confine(confinedText+"SYSCALL_DEFINE1(op, int, id)\n{\n\treturn op(id);\n}\n", "desc")
	if why != "" || !slices.Contains(c.Users["op"], UnknownUser) {
		t.Errorf("users of op %v, %q: a macro's function calls it", c.Users["op"], why)
	}
}
