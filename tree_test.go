// SPDX-License-Identifier: Apache-2.0

package klatch

import (
	"bytes"
	"os"
	"path"
	"regexp"
	"strings"
	"testing"
)

const (
	apache = "SPDX-License-Identifier: Apache-2.0"
	gpl    = "SPDX-License-Identifier: GPL-2.0-only"
)

// longFiles may exceed maxLines; the value is the reason.
var longFiles = map[string]string{}

// maxLines is where a file stops fitting in a reader's head.
const maxLines = 500

func TestLicenseLines(t *testing.T) {
	for _, file := range filesBelow(t, ".", ".go", ".sh") {
		if !bytes.Contains(head(t, file), []byte(apache)) {
			t.Errorf("%s: the first lines do not say %q", file, apache)
		}
	}
	for _, file := range filesBelow(t, ".", ".c", ".h", ".S", ".c.tmpl", ".lds") {
		want, first := apache, head(t, file)
		if goesIntoKernel(t, file) {
			want = gpl
		}
		if !bytes.Contains(first, []byte(want)) {
			t.Errorf("%s: the first lines do not say %q", file, want)
		}
	}
}

var kernelInclude = regexp.MustCompile(`(?m)^\s*#\s*include\s*<linux/(module|kernel|livepatch|init|kthread)\.h>|\bMODULE_LICENSE\(`)

// goesIntoKernel tells kernel code from C programs of user space by what a
// kernel module cannot do without. Everything in lab/livepatches is kernel
// code whatever it includes.
func goesIntoKernel(t *testing.T, file string) bool {
	t.Helper()
	if strings.HasPrefix(file, "lab/livepatches/") {
		return true
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return kernelInclude.Match(b)
}

// head returns the lines in which a license line must be: after a #! line
// or the mark of generated code, but not further down.
func head(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfterN(b, []byte("\n"), 5)
	return bytes.Join(lines[:min(len(lines), 4)], nil)
}

// maxFile is more than any file that people write; programs, packages and
// kernels are larger, and are made, not kept.
const maxFile = 256 << 10

func TestNothingMadeIsKept(t *testing.T) {
	for _, file := range filesBelow(t, ".", "") {
		st, err := os.Lstat(file)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() > maxFile {
			t.Errorf("%s has %d bytes: a program or package does not belong into the tree", file, st.Size())
		}
	}
}

func TestFileLength(t *testing.T) {
	seen := map[string]bool{}
	for _, file := range filesBelow(t, ".", ".go") {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path.Base(file), "_gen.go") {
			continue
		}
		n := bytes.Count(b, []byte("\n"))
		reason, listed := longFiles[file]
		seen[file] = listed && n > maxLines
		if n > maxLines && !listed {
			t.Errorf("%s has %d lines; split it, or list it in longFiles with the reason", file, n)
		}
		if listed && reason == "" {
			t.Errorf("%s is listed in longFiles without a reason", file)
		}
	}
	for file := range longFiles {
		if !seen[file] {
			t.Errorf("%s is listed in longFiles but is not longer than %d lines", file, maxLines)
		}
	}
}
