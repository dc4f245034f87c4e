// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
)

// repository is a Debian archive in a folder, with one package, signed by a
// key that the test makes.
type repository struct {
	t               *testing.T
	dir, home, keys string
}

func newRepository(t *testing.T) *repository {
	t.Helper()
	testkit.Need(t, "apt", "gpg")
	dir, err := os.MkdirTemp("/var/tmp", "klatch-archive-test-") // apt's user must get there
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &repository{t, filepath.Join(dir, "mirror"), filepath.Join(dir, "gnupg"), filepath.Join(dir, "keys.gpg")}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{r.dir, filepath.Join(r.dir, "dists/stable/main/binary-amd64"), filepath.Join(r.dir, "pool")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(r.home, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("gpgconf", "--homedir", r.home, "--kill", "all").Run() })
	for _, who := range []string{"archive@test.invalid", "stranger@test.invalid"} {
		r.run("gpg", "--homedir", r.home, "--batch", "--passphrase", "", "--quick-generate-key", who, "ed25519", "sign", "never")
	}
	r.run("gpg", "--homedir", r.home, "--batch", "--output", r.keys, "--export", "archive@test.invalid")
	if err := os.Chmod(r.keys, 0o644); err != nil {
		t.Fatal(err)
	}
	r.publish("archive@test.invalid")
	return r
}

func (r *repository) run(argv ...string) {
	r.t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		r.t.Fatalf("%v: %v: %s", argv, err, out)
	}
}

func (r *repository) write(rel string, b []byte) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, rel), b, 0o644); err != nil {
		r.t.Fatal(err)
	}
}

const (
	debFile  = "pool/linux-thing_1.0-1_amd64.deb"
	packages = "dists/stable/main/binary-amd64/Packages"
	inFile   = "dists/stable/InRelease"
)

// publish makes the package and the lists, as an archive does, signed by one
// of the keys; nobody's makes a Release file without a signature.
func (r *repository) publish(signer string) {
	r.t.Helper()
	root := r.t.TempDir()
	for name, text := range map[string]string{
		"DEBIAN/control": "Package: linux-thing\nVersion: 1.0-1\nArchitecture: amd64\nMaintainer: Test <t@test.invalid>\nDescription: a thing\n",
		"usr/src/thing":  "what it holds\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			r.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
	r.run("dpkg-deb", "--root-owner-group", "--build", root, filepath.Join(r.dir, debFile))
	deb, err := os.ReadFile(filepath.Join(r.dir, debFile))
	if err != nil {
		r.t.Fatal(err)
	}
	list := fmt.Appendf(nil, "Package: linux-thing\nVersion: 1.0-1\nArchitecture: amd64\nMaintainer: Test <t@test.invalid>\nFilename: %s\nSize: %d\nSHA256: %x\nDescription: a thing\n\n",
		debFile, len(deb), sha256.Sum256(deb))
	r.write(packages, list)
	release := fmt.Appendf(nil, "Origin: Test\nSuite: stable\nCodename: stable\nDate: %s\nArchitectures: amd64\nComponents: main\nSHA256:\n %x %d main/binary-amd64/Packages\n",
		time.Now().UTC().Format(time.RFC1123), sha256.Sum256(list), len(list))
	_ = os.Remove(filepath.Join(r.dir, inFile))
	r.write("dists/stable/Release", release)
	if signer != "" {
		r.run("gpg", "--homedir", r.home, "--batch", "--yes", "--local-user", signer, "--output", filepath.Join(r.dir, inFile),
			"--clearsign", filepath.Join(r.dir, "dists/stable/Release"))
	}
}

func (r *repository) open() *Archive {
	r.t.Helper()
	a, err := Open(filepath.Join(filepath.Dir(r.dir), "apt"), []Suite{{URI: "file:" + r.dir, Name: "stable", SignedBy: r.keys}})
	if err != nil {
		r.t.Fatal(err)
	}
	return a
}

// fetch is what kernel add does: lists, package, files.
func (r *repository) fetch(ctx context.Context) error {
	a := r.open()
	if err := a.Update(ctx, true); err != nil {
		return err
	}
	p, err := a.Find(ctx, "linux-thing", "")
	if err != nil {
		return err
	}
	if err := a.Download(ctx, []Package{p}, func(string, int64, int64) {}); err != nil {
		return err
	}
	into := r.t.TempDir()
	if err := os.Chmod(filepath.Dir(into), 0o755); err != nil {
		return err
	}
	if err := sandbox.Own(into); err != nil {
		return err
	}
	if err := Unpack(ctx, a.File(p), into); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(into, "usr/src/thing"))
	if err == nil && string(b) != "what it holds\n" {
		err = fmt.Errorf("unpacked %q", b)
	}
	return err
}

func (r *repository) change(rel, from, to string) {
	r.t.Helper()
	old, err := os.ReadFile(filepath.Join(r.dir, rel))
	if err != nil {
		r.t.Fatal(err)
	}
	changed := bytes.Replace(old, []byte(from), []byte(to), 1)
	if bytes.Equal(old, changed) {
		r.t.Fatalf("%s has no %q", rel, from)
	}
	r.write(rel, changed)
}

// Who owns a mirror can change anything on it but signatures. Each case is
// refused as untrusted, leaves nothing that a later run would take, and the
// next run on a mended mirror goes on.
func TestATamperedArchiveIsRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		tamper func(*repository)
	}{
		{"a package list that was changed", func(r *repository) { r.change(packages, "1.0-1", "1.0-2") }},
		{"a package list of another length", func(r *repository) { r.change(packages, "a thing", "another thing") }},
		{"a signed list of digests that was changed", func(r *repository) { r.change(inFile, "Origin: Test", "Origin: Tost") }},
		{"a signature by a stranger", func(r *repository) { r.publish("stranger@test.invalid") }},
		{"no signature", func(r *repository) { r.publish("") }},
		{"a package that was changed", func(r *repository) { r.change(debFile, "data.tar", "dbta.tar") }},
		{"a package that was cut", func(r *repository) {
			b, err := os.ReadFile(filepath.Join(r.dir, debFile))
			if err != nil {
				r.t.Fatal(err)
			}
			r.write(debFile, b[:len(b)-10])
		}},
		{"a package with more at its end", func(r *repository) {
			b, err := os.ReadFile(filepath.Join(r.dir, debFile))
			if err != nil {
				r.t.Fatal(err)
			}
			r.write(debFile, append(b, make([]byte, 10)...))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRepository(t)
			c.tamper(r)
			err := r.fetch(t.Context())
			if fault.KindOf(err) != fault.Untrusted || fault.HintOf(err) == "" {
				t.Errorf("error of kind %q: %v; hint %q", fault.KindOf(err), err, fault.HintOf(err))
			}
			left, _ := filepath.Glob(filepath.Join(r.open().dir, "debs", "*"))
			hidden, _ := filepath.Glob(filepath.Join(r.open().dir, "debs", ".*"))
			if len(left)+len(hidden) != 0 {
				t.Errorf("left behind: %v %v", left, hidden)
			}
			r.publish("archive@test.invalid")
			if err := r.fetch(t.Context()); err != nil {
				t.Errorf("on the mended archive: %v", err)
			}
		})
	}
}

// Lists that were good once are not used in place of ones that are bad now:
// who can freeze a machine at old lists can keep fixes away from it.
func TestOldListsAreNoExcuseForBadOnes(t *testing.T) {
	r := newRepository(t)
	if err := r.fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.publish("stranger@test.invalid")
	if err := r.fetch(t.Context()); fault.KindOf(err) != fault.Untrusted {
		t.Errorf("error %v", err)
	}
}

func TestProcessesWaitForEachOthersLists(t *testing.T) {
	r := newRepository(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := r.open().Update(t.Context(), true); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()

	a := r.open()
	unlock, err := durable.Lock(a.path("klatch.lock"))
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	a.Say = func(format string, _ ...any) { said <- format }
	done := make(chan error, 1)
	go func() { done <- a.Update(t.Context(), true) }()
	if text := <-said; !strings.Contains(text, "waiting") {
		t.Errorf("said %q", text)
	}
	select {
	case err := <-done:
		t.Fatalf("did not wait: %v", err)
	default:
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("after the wait: %v", err)
	}

	if _, err := durable.Lock(a.path("klatch.lock")); err != nil {
		t.Fatal(err)
	}
	a.Say = nil
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := a.Update(ctx, true); err == nil {
		t.Error("a wait without end")
	}
}
