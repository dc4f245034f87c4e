// SPDX-License-Identifier: Apache-2.0

package klatch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "klatch/"

// layer is one row of the import table.
type layer struct {
	prefix string   // of the package path, in whole path elements
	may    []string // prefixes of our own packages; the row's own prefix is always allowed
	libs   []string // prefixes of third-party packages; anyLib for "one chosen with a reason"
	not    []string // packages that are banned although nothing else says so
}

// layers is the import table of ARCHITECTURE.md, which holds a copy that
// TestImportTableIsDocumented compares. A package belongs to the first row
// whose prefix matches. A package without a row is an error: that is how a
// package called util is kept out.
var layers = []layer{
	// Nouns: plain data and pure functions.
	{"internal/fault", nil, nil, noIO},
	{"internal/kernel", []string{"internal/fault"}, debVersion, noIO},
	{"internal/cve", []string{"internal/fault"}, nil, noIO},
	{"internal/window", []string{"internal/fault"}, nil, noIO},
	{"internal/livepatch", []string{"internal/fault", "internal/kernel", "internal/cve"}, nil, noIO},
	{"internal/stall", nouns[:5], nil, noIO},
	{"internal/tracer", nouns[:5], nil, noIO},
	{"internal/coverage", nouns[:5], debVersion, noIO},
	{"internal/fleet", nouns[:6], nil, noIO},
	{"internal/wire", append([]string{"internal/stall", "internal/tracer"}, nouns[:7]...), nil, noIO},
	{"internal/notice", []string{"internal/fault", "internal/kernel", "internal/cve"}, nil, noIO},
	{"internal/rollout", []string{"internal/fault", "internal/kernel", "internal/cve", "internal/livepatch"}, nil, noIO},

	// Mechanisms: one technical job each.
	{"internal/durable", nouns, unixOnly, rootBan},
	{"internal/trust", withDurable, []string{"golang.org/x/mod/sumdb/note", "golang.org/x/crypto/cryptobyte"}, rootBan},
	{"internal/trustsign", slices.Concat(withDurable, []string{"internal/trust"}), []string{"golang.org/x/mod/sumdb/note"}, noExec},
	{"internal/pki", withDurable, []string{"golang.org/x/crypto"}, noExec},
	{"internal/translog", []string{"internal/fault"}, []string{"golang.org/x/mod/sumdb"}, rootBan},
	{"internal/evidence", slices.Concat(nouns, []string{"internal/trust"}), nil, noIO},
	{"internal/wirecall", withDurable, nil, noExec},
	{"internal/token", withDurable, anyLib, noExec},
	{"internal/keyfile", slices.Concat(withDurable, []string{"internal/token"}), anyLib, noExec},
	{"internal/tufrepo", withDurable, anyLib, noExec},
	{"internal/tufclient", withDurable, anyLib, noExec},
	{"internal/conf", withDurable, anyLib, noExec},
	{"internal/cli", withDurable, anyLib, noExec},
	{"internal/obs", nouns, anyLib, noExec},

	// The root program: everything that runs with privileges.
	{"internal/machine/klp", []string{"internal/kernel", "internal/machine/loaderapi", "internal/durable", "internal/fault"}, unixOnly, rootBan},
	{"internal/machine/loaderapi", []string{"internal/kernel", "internal/livepatch", "internal/fault"}, unixOnly, rootBan},
	{"internal/machine/loader", rootMay, nil, rootBan},
	{"cmd/klatch-loader", append([]string{"internal/machine/loader"}, rootMay...), nil, rootBan},

	// Programs: they meet in nouns and mechanisms only.
	{"internal/forge", append([]string{"lab/scenarios"}, nounsAndMechanisms...), anyLib, nil},
	{"internal/server", nounsAndMechanisms, anyLib, noExec},
	{"internal/machine", nounsAndMechanisms, anyLib, append([]string{"klatch/internal/machine/loader"}, noExec...)},

	{"internal/testkit", []string{"internal"}, anyLib, nil},

	// Programs that run in a lab guest stand alone, and so do the stories.
	{"lab/scenarios", nil, nil, noIO},
	{"lab/checks", nil, nil, []string{"net", "os/exec"}},

	{"cmd/klatch-forge", programMay("internal/forge"), anyLib, nil},
	{"cmd/klatch-server", programMay("internal/server"), anyLib, noExec},
	{"cmd/klatch-fleet", programMay("internal/server"), anyLib, noExec},
	{"cmd/tuf-conformance-client", []string{"internal/durable", "internal/tufclient"}, anyLib, nil}, // a test tool
	{"cmd/klatchd", programMay("internal/machine"), anyLib, noExec},
	{"cmd/klatch", programMay("internal/machine"), anyLib, noExec},
}

var (
	nouns = []string{"internal/fault", "internal/kernel", "internal/cve", "internal/window",
		"internal/livepatch", "internal/coverage", "internal/fleet", "internal/wire", "internal/notice", "internal/stall", "internal/tracer", "internal/rollout"}
	mechanisms = []string{"internal/durable", "internal/trust", "internal/trustsign", "internal/pki", "internal/conf",
		"internal/cli", "internal/obs", "internal/tufrepo", "internal/tufclient", "internal/translog", "internal/keyfile", "internal/token", "internal/evidence", "internal/wirecall"}
	nounsAndMechanisms = slices.Concat(nouns, mechanisms)
	withDurable        = slices.Concat(nouns, []string{"internal/durable"})
	rootMay            = []string{"internal/machine/klp", "internal/machine/loaderapi", "internal/trust",
		"internal/livepatch", "internal/kernel", "internal/durable", "internal/fault"}

	noIO = []string{"os", "os/exec", "os/signal", "net", "net/http", "crypto/tls", "database/sql", "syscall", "context", "log", "log/slog"}
	// rootBan keeps the root program without network, without other programs
	// and without anything that interprets text. crypto/x509 is here because
	// it links package net.
	rootBan = []string{"net", "net/http", "crypto/tls", "crypto/x509", "os/exec", "os/user", "database/sql",
		"html/template", "text/template", "encoding/gob", "plugin", "expvar"}
	noExec = []string{"os/exec", "plugin"}

	anyLib     = []string{"*"}
	unixOnly   = []string{"golang.org/x/sys/unix"}
	debVersion = []string{"github.com/knqyf263/go-deb-version"} // pure comparison of version strings

	// drivers may be imported by main packages only: an engine knows its
	// interface, cmd joins it with a driver.
	drivers = []string{"internal/forge/build/klpbuild", "internal/forge/build/objbuild", "internal/forge/build/source",
		"internal/forge/lab/qemu", "internal/forge/lab/board", "internal/server/store/sqlstore",
		"internal/server/blob/fsblob", "internal/server/blob/s3blob"}

	// rootLibs is the whole third-party code that the root program may link.
	// A new line needs an ADR and both owners of cmd/klatch-loader.
	rootLibs = []string{"golang.org/x/mod/sumdb/note", "golang.org/x/sys/unix", "golang.org/x/crypto/cryptobyte"}
)

// rootPackages are counted against rootBudget: what a reviewer must read to
// know what runs as root and what it believes.
var rootPackages = []string{"internal/machine/loader", "internal/machine/klp", "internal/machine/loaderapi", "internal/trust"}

// rootBudget is in lines of Go without tests, comments included.
const rootBudget = 2000

func programMay(own string) []string { return append([]string{own}, nounsAndMechanisms...) }

type pkg struct {
	ImportPath string
	Name       string
	Imports    []string
	GoFiles    []string
	Doc        string
	Standard   bool
}

func TestImportTable(t *testing.T) {
	for _, p := range goList(t, "-tags=vm,system", "./...") {
		for _, v := range violations(p) {
			t.Error(v)
		}
	}
}

// violations says what is wrong with one package of this module.
func violations(p pkg) []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }

	path, inside := strings.CutPrefix(p.ImportPath, module)
	if p.Doc == "" && len(p.GoFiles) > 0 {
		say("%s has no package comment", p.ImportPath)
	}
	if !inside { // the root package
		if len(p.Imports) > 0 {
			say("the root package imports %q; it holds a comment and tests", p.Imports)
		}
		return bad
	}
	i := slices.IndexFunc(layers, func(l layer) bool { return under(path, l.prefix) })
	if i < 0 {
		say("%s has no row in the import table", path)
		return bad
	}
	l := layers[i]
	for _, imp := range p.Imports {
		if slices.Contains(l.not, imp) {
			say("%s imports %s, banned in layer %q", path, imp, l.prefix)
			continue
		}
		dep, ours := strings.CutPrefix(imp, module)
		switch {
		case !ours && thirdParty(imp) && !slices.Contains(l.libs, "*") && !underAny(imp, l.libs):
			say("%s imports %s, a library that layer %q does not list", path, imp, l.prefix)
		case !ours:
		case under(dep, "internal/testkit"):
			if !under(path, "internal/testkit") && !strings.HasSuffix(path, "test") {
				say("%s imports %s; only tests and conformance suites may", path, dep)
			}
		case isDriver(dep) && !under(path, "cmd") && !under(path, "internal/testkit") && !sharesDriver(path, dep):
			say("%s imports driver %s; only cmd may", path, dep)
		case !under(dep, l.prefix) && !underAny(dep, l.may):
			say("%s imports %s, not allowed for layer %q", path, dep, l.prefix)
		}
	}
	return bad
}

// TestImportTableCatches plants one violation of each kind, so that a slip
// in violations cannot switch the table off unseen.
func TestImportTableCatches(t *testing.T) {
	for _, tt := range []struct {
		name, path, imp, want string
	}{
		{"a noun does I/O", "internal/kernel", "os", "banned"},
		{"a noun looks to its right", "internal/kernel", "klatch/internal/livepatch", "not allowed"},
		{"a noun takes a library", "internal/cve", "github.com/spf13/cobra", "does not list"},
		{"a mechanism knows a program", "internal/tufclient", "klatch/internal/machine/agent", "not allowed"},
		{"two programs meet", "internal/server/api", "klatch/internal/forge/publish", "not allowed"},
		{"the server starts a program", "internal/server/api", "os/exec", "banned"},
		{"the loader opens the network", "internal/machine/loader", "net", "banned"},
		{"the loader takes a library", "internal/machine/loader", "github.com/spf13/cobra", "does not list"},
		{"the root program uses certificates", "cmd/klatch-loader", "crypto/x509", "banned"},
		{"the daemon links the loader", "internal/machine/agent", "klatch/internal/machine/loader", "banned"},
		{"an engine names a driver", "internal/forge/build", "klatch/internal/forge/build/objbuild", "driver"},
		{"code uses the test kit", "internal/machine/agent", "klatch/internal/testkit/klpfake", "only tests"},
		{"a command imports a command", "cmd/klatch", "klatch/cmd/klatchd", "not allowed"},
		{"a package without a row", "internal/util", "fmt", "no row"},
		{"a name that only starts like a row", "internal/kernelx", "fmt", "no row"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := violations(pkg{ImportPath: module + tt.path, Imports: []string{tt.imp}, GoFiles: []string{"x.go"}, Doc: "x"})
			if len(got) != 1 || !strings.Contains(got[0], tt.want) {
				t.Errorf("violations = %q, want one with %q", got, tt.want)
			}
		})
	}
	t.Run("a package without a comment", func(t *testing.T) {
		if got := violations(pkg{ImportPath: "klatch/internal/fault", GoFiles: []string{"x.go"}}); len(got) != 1 {
			t.Errorf("violations = %q, want one", got)
		}
	})
	for path, imp := range map[string]string{
		"internal/machine/loaderapi":       "golang.org/x/sys/unix",
		"internal/forge/build/buildtest":   "klatch/internal/testkit",
		"internal/forge/build/objbuild":    "klatch/internal/forge/build/match",
		"internal/forge/lab/qemu/console":  "klatch/internal/forge/lab/qemu",
		"internal/server/store/sqlstore/x": "klatch/internal/server/store",
		"cmd/klatch-forge":                 "klatch/internal/forge/build/objbuild",
		"cmd/klatchd":                      "klatch/internal/pki",
	} {
		if got := violations(pkg{ImportPath: module + path, Imports: []string{imp}, Doc: "x"}); len(got) > 0 {
			t.Errorf("%s may import %s, but: %q", path, imp, got)
		}
	}
}

// TestRootProgramLinks looks at everything that ends up in klatch-loader,
// however indirectly.
func TestRootProgramLinks(t *testing.T) {
	if _, err := os.Stat("cmd/klatch-loader"); errors.Is(err, fs.ErrNotExist) {
		return // nothing is linked yet
	}
	for _, p := range goList(t, "-deps", "./cmd/klatch-loader") {
		path, ours := strings.CutPrefix(p.ImportPath, module)
		switch {
		case slices.Contains(rootBan, p.ImportPath):
			t.Errorf("klatch-loader links %s", p.ImportPath)
		case p.Standard:
		case ours && path != "cmd/klatch-loader" && path != "internal/cve" && !underAny(path, rootMay) && path != "internal/machine/loader":
			t.Errorf("klatch-loader links %s, which is not on the list of the root program", path)
		case !ours && !underAny(p.ImportPath, rootLibs):
			t.Errorf("klatch-loader links %s, which is not on the list of third-party code", p.ImportPath)
		}
	}
}

func TestRootBudget(t *testing.T) {
	total := 0
	for _, dir := range rootPackages {
		lines := 0
		for _, file := range filesBelow(t, dir, ".go") {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			lines += bytes.Count(b, []byte("\n"))
		}
		t.Logf("%-28s %5d lines", dir, lines)
		total += lines
	}
	if total >= rootBudget {
		t.Errorf("the privileged code has %d lines; the budget is %d. What can be done without root?", total, rootBudget)
	}
}

// goList runs go list as the loader and the release are built.
func goList(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Name,Imports,GoFiles,Doc,Standard"}, args...)...)
	cmd.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0", "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var pkgs []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// filesBelow lists the files below dir with one of the suffixes, as slash
// paths. A folder that does not exist has no files. Test data, build output
// and git's own files are left out.
func filesBelow(t *testing.T, dir string, suffixes ...string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && path == dir:
			return nil
		case err != nil:
			return err
		case d.IsDir() && (slices.Contains([]string{".git", "testdata", "bin", "node_modules"}, d.Name()) || filepath.ToSlash(path) == "dist/out"):
			return fs.SkipDir
		case !d.IsDir() && slices.ContainsFunc(suffixes, func(s string) bool { return strings.HasSuffix(path, s) }):
			files = append(files, filepath.ToSlash(path))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func under(path, prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }

func underAny(path string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return under(path, p) })
}

// thirdParty tells a library from the standard library by the dot in its
// first element.
func thirdParty(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	return strings.Contains(first, ".")
}

func isDriver(dep string) bool { return underAny(dep, drivers) }

// sharesDriver says that both packages are parts of the same driver.
func sharesDriver(path, dep string) bool {
	return slices.ContainsFunc(drivers, func(d string) bool { return under(path, d) && under(dep, d) })
}
