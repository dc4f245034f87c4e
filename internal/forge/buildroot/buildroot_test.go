// SPDX-License-Identifier: Apache-2.0

package buildroot

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// fakes stand for apt and debootstrap. The archive has three packages; what
// debootstrap does beside installing them is the test's.
type fakes struct {
	t     *testing.T
	cache string
	bin   string
	maker Maker
	spec  Spec
	steps []string
}

func newFakes(t *testing.T) *fakes {
	t.Helper()
	testkit.Need(t, "root")
	dir := t.TempDir()
	f := &fakes{t: t, cache: filepath.Join(dir, "cache"), bin: filepath.Join(dir, "bin"),
		spec: Spec{Name: "debian-13", Suite: "trixie", Packages: []string{"gcc-14"}, Toolchain: []string{"gcc-14"}}}
	if err := os.MkdirAll(f.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", f.bin+":"+os.Getenv("PATH"))
	a, err := archive.Open(filepath.Join(dir, "apt"), []archive.Suite{{URI: "http://mirror.invalid/debian", Name: "trixie"}})
	if err != nil {
		t.Fatal(err)
	}
	f.maker = Maker{Archive: a, Cache: f.cache, Progress: func(string, int64, int64) {},
		Step: func(what string) func(string) { f.steps = append(f.steps, what); return func(string) {} }}
	f.offer("14.2.0-19")
	f.debootstrap("")
	return f
}

// offer makes the archive have one version of the compiler.
func (f *fakes) offer(version string) {
	var inst, stanzas strings.Builder
	for _, p := range [][2]string{{"apt", "3.0.4"}, {"base-files", "13.8"}, {"gcc-14", version}} {
		deb := p[0] + "_" + p[1] + "_amd64.deb"
		fmt.Fprintf(&inst, "Inst %s (%s Debian:13.8/stable [amd64])\n", p[0], p[1])
		fmt.Fprintf(&stanzas, "Package: %s\nVersion: %s\nFilename: pool/main/%s\nSize: %d\nSHA256: %x\n\n", p[0], p[1], deb, len(deb), sha256.Sum256([]byte(deb)))
	}
	f.program("apt-get", "case \"$*\" in *install*) cat <<'E'\n"+inst.String()+"E\n;; *download*)\n"+
		"for a; do case $a in *::*) ;; *=*) d=$(echo $a | tr = _)_amd64.deb; printf %s $d > $d; esac; done;; esac\n")
	f.program("apt-cache", "cat <<'E'\n"+stanzas.String()+"E\n")
}

// debootstrap installs what the mirror has, then runs more of a script with
// the folder as $root.
func (f *fakes) debootstrap(more string) {
	f.program("debootstrap", `for a; do suite=$root; root=$mirror; mirror=${a#file://}; done
set -e
mkdir -p $root/var/lib/dpkg $root/usr/bin $root/usr/share/doc/x $root/etc
cd $mirror
awk '/^Filename:/{print $2}' dists/$suite/main/binary-amd64/Packages | xargs cat > $root/usr/bin/all
awk '/^Package:/{print; print "Status: install ok installed"} /^Version:/{print; print ""}' \
	dists/$suite/main/binary-amd64/Packages > $root/var/lib/dpkg/status
sha256sum dists/$suite/main/binary-amd64/Packages | cut -d' ' -f1 > /dev/null
grep -q "$(sha256sum dists/$suite/main/binary-amd64/Packages | cut -d' ' -f1)" dists/$suite/Release
grep -c : /proc/self/net/dev > $root/etc/interfaces
`+more)
}

func (f *fakes) program(name, script string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.bin, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakes) left() []string {
	found, _ := filepath.Glob(filepath.Join(f.cache, "buildroots", "[^.]*"))
	torn, _ := filepath.Glob(filepath.Join(f.cache, "buildroots", ".making*"))
	return append(found, torn...)
}

func TestMadeOnceAndFound(t *testing.T) {
	f := newFakes(t)
	r, err := f.maker.Make(t.Context(), f.spec, map[string]string{"gcc-14": "14.2.0-19"})
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(filepath.Join(r.Dir, "usr/bin/all")); !strings.Contains(string(b), "gcc-14_14.2.0-19_amd64.deb") {
		t.Errorf("installed %q", b)
	}
	if b, _ := os.ReadFile(filepath.Join(r.Dir, "etc/interfaces")); string(b) != "1\n" { // lo
		t.Errorf("debootstrap saw %q network interfaces", b)
	}
	if _, err := os.Stat(filepath.Join(r.Dir, "usr/share/doc/x")); err == nil {
		t.Error("documentation stayed")
	}
	steps := len(f.steps)
	f.debootstrap("exit 1")
	again, err := f.maker.Make(t.Context(), f.spec, map[string]string{"gcc-14": "14.2.0-19"})
	if err != nil || again.Dir != r.Dir || again.Digest != r.Digest || len(f.steps) != steps {
		t.Errorf("again: %+v, %v, steps %v", again, err, f.steps)
	}
	if found, err := Find(f.cache, "debian-13", r.Versions(f.spec.Toolchain)); err != nil || found.Dir != r.Dir {
		t.Errorf("found %+v, %v", found, err)
	}
	if left := f.left(); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func TestAnotherCompilerIsAnotherFolder(t *testing.T) {
	f := newFakes(t)
	old, err := f.maker.Make(t.Context(), f.spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.maker.Make(t.Context(), f.spec, map[string]string{"gcc-14": "14.2.0-20"})
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "wanted gcc-14 14.2.0-20, the archive has gcc-14 14.2.0-19") {
		t.Errorf("a compiler that the archive does not have: %v", err)
	}
	f.offer("14.2.0-20")
	r, err := f.maker.Make(t.Context(), f.spec, map[string]string{"gcc-14": "14.2.0-20"})
	if err != nil || r.Digest == old.Digest || r.Dir == old.Dir {
		t.Fatalf("%+v, %v", r, err)
	}
	for version, want := range map[string]string{"14.2.0-19": old.Dir, "14.2.0-20": r.Dir} {
		if found, err := Find(f.cache, "debian-13", map[string]string{"gcc-14": version}); err != nil || found.Dir != want {
			t.Errorf("found for %s: %+v, %v", version, found, err)
		}
	}
	_, err = Find(f.cache, "debian-13", map[string]string{"gcc-14": "13.1"})
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "14.2.0-19") {
		t.Errorf("nothing fits: %v", err)
	}
}

func TestTornFolderIsThrownAway(t *testing.T) {
	f := newFakes(t)
	f.debootstrap("touch $root/../../reached; sleep 60")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for range 500 {
			if found, _ := filepath.Glob(filepath.Join(f.cache, "buildroots/.making-*/reached")); len(found) > 0 {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	if _, err := f.maker.Make(ctx, f.spec, nil); err == nil {
		t.Fatal("a canceled run made a folder")
	}
	if _, err := Find(f.cache, "debian-13", nil); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a torn folder was found: %v", err)
	}
	torn := filepath.Join(f.cache, "buildroots/.making-debian-13-killed/out/root") // kill -9 leaves one
	if err := os.MkdirAll(torn, 0o755); err != nil {
		t.Fatal(err)
	}
	f.debootstrap("")
	if _, err := f.maker.Make(t.Context(), f.spec, nil); err != nil {
		t.Fatal(err)
	}
	if left := f.left(); len(left) != 1 || strings.Contains(left[0], ".making") {
		t.Errorf("left: %v", left)
	}
}

func TestWhatAptDidNotChooseIsRefused(t *testing.T) {
	for name, more := range map[string]string{
		"one more":      `printf 'Package: evil\nStatus: install ok installed\nVersion: 1\n\n' >> $root/var/lib/dpkg/status`,
		"one less":      `sed -i '/base-files/,/^$/d' $root/var/lib/dpkg/status`,
		"other version": `sed -i 's/13.8/13.7/' $root/var/lib/dpkg/status`,
		"half there":    `sed -i '0,/install ok installed/s//install ok half-configured/' $root/var/lib/dpkg/status`,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakes(t)
			f.debootstrap(more)
			if _, err := f.maker.Make(t.Context(), f.spec, nil); err == nil || !strings.Contains(err.Error(), "something else than apt chose") {
				t.Errorf("error %v", err)
			}
			if left := f.left(); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestNewestOfSeveralIsFound(t *testing.T) {
	cache := t.TempDir()
	for i, digest := range []string{"aaaaaaaaaaaaaaaa", "cccccccccccccccc", "bbbbbbbbbbbbbbbb"} {
		dir := filepath.Join(cache, "buildroots", "debian-13_"+digest)
		b, err := json.Marshal(about{"debian-13", digest, map[string]string{"gcc-14": "14.2.0-19"}, time.Unix(int64(i), 0)})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, aboutName), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Find(cache, "debian-13", nil)
	if err != nil || r.Digest != "bbbbbbbbbbbbbbbb" {
		t.Errorf("found %+v, %v", r, err)
	}
}
