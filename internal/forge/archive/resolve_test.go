// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
)

// fakeApt puts programs with apt's names first in PATH.
func fakeApt(t *testing.T, programs map[string]string) *Archive {
	t.Helper()
	dir := t.TempDir()
	a, err := Open(filepath.Join(dir, "apt"), []Suite{{URI: "http://mirror.invalid/debian", Name: "trixie"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, script := range programs {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return a
}

const simulated = `Reading package lists...
The following NEW packages will be installed:
  b a
Inst b (1:2.0-1 Debian:13.8/stable [amd64]) []
Inst a (1.0 Debian:13.8/stable, Debian-Security:13/stable-security [all])
Conf b (1:2.0-1 Debian:13.8/stable [amd64])
`

func TestClosureIsWhatAptWouldInstall(t *testing.T) {
	a := fakeApt(t, map[string]string{
		"apt-get": "cat <<'E'\n" + simulated + "E\n",
		"apt-cache": `for w; do shift; case $w in show) break;; esac; done
[ "$*" = "b=1:2.0-1 a=1.0" ] || exit 1
cat <<'E'
Package: b
Version: 1:2.0-1
Description: first
 second line
Size: 7
SHA256: bb

Package: a
Version: 1.0
Size: 5
SHA256: aa

Package: a
Version: 1.0
Size: 5
SHA256: aa
E
`})
	ps, err := a.Closure(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	if len(ps) != 2 || ps[0].Name != "a" || ps[1].Name != "b" || ps[1].Version != "1:2.0-1" || ps[1].SHA256 != "bb" || ps[1].Bytes != 7 {
		t.Errorf("packages %+v", ps)
	}
	if want := "Package: b\nVersion: 1:2.0-1\nDescription: first\n second line\nSize: 7\nSHA256: bb\n"; ps[1].Control != want {
		t.Errorf("stanza %q", ps[1].Control)
	}
}

func TestClosureThatTheListsDoNotHave(t *testing.T) {
	a := fakeApt(t, map[string]string{"apt-get": "cat <<'E'\n" + simulated + "E\n",
		"apt-cache": "printf 'Package: a\\nVersion: 1.0\\n\\nPackage: b\\nVersion: 1:1.9-1\\n\\n'\n"})
	if _, err := a.Closure(t.Context(), "b"); err == nil || !strings.Contains(err.Error(), "b=1:2.0-1") {
		t.Errorf("error %v", err)
	}
	a = fakeApt(t, map[string]string{"apt-get": "echo nothing\n", "apt-cache": "exit 1\n"})
	if _, err := a.Closure(t.Context(), "b"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("error %v", err)
	}
}

func TestPackagesAreFetchedInBatches(t *testing.T) {
	ps := []Package{{Bytes: 30 << 20}, {Bytes: 30 << 20}, {Bytes: 5 << 20}, {Bytes: 300 << 20}, {Bytes: 1}}
	var got []int
	for len(ps) > 0 {
		n, _ := batch(ps)
		got = append(got, n)
		ps = ps[n:]
	}
	if want := []int{2, 1, 1, 1}; len(got) != len(want) || got[0] != 2 || got[2] != 1 {
		t.Errorf("batches %v, want %v", got, want)
	}
}

// What apt wrote is taken in by its digest, whatever its name; a file that is
// in no signed list is not.
func TestDownloadsAreWhatTheSignedListSays(t *testing.T) {
	a := fakeApt(t, map[string]string{"apt-get": "printf one > x.deb; printf two > y.deb\n"})
	one := Package{Name: "one", Version: "1", Bytes: 3, SHA256: "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}
	two := Package{Name: "two", Version: "1", Bytes: 3, SHA256: "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"}
	none := func(string, int64, int64) {}
	if err := a.Download(t.Context(), []Package{two, one}, none); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[Package]string{one: "one", two: "two"} {
		if b, _ := os.ReadFile(a.File(p)); string(b) != want {
			t.Errorf("%s holds %q", p.Name, b)
		}
	}
	changed := two
	changed.Name, changed.SHA256 = "changed", strings.Repeat("0", 64)
	err := a.Download(t.Context(), []Package{one, changed, {Name: "more", SHA256: strings.Repeat("1", 64), Bytes: 3}}, none)
	if fault.KindOf(err) != fault.Untrusted {
		t.Errorf("error %v", err)
	}
	if missing, _ := a.Missing([]Package{changed}); missing == 0 {
		t.Error("a file of another digest was taken in")
	}
}
