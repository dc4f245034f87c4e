// SPDX-License-Identifier: Apache-2.0

// Package archive gets packages from Debian's archive through apt, which
// checks the archive's signatures. It keeps an apt state folder of its own:
// the host's sources, lists and installed packages stay untouched. Mirrors are
// those that the host itself uses, unless the caller names others.
package archive

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/fault"
)

// Progress takes a line for a person; done and total are bytes, total 0 where
// unknown.
type Progress func(what string, done, total int64)

// Suite is one line of apt's sources.
type Suite struct {
	URI  string
	Name string // such as bookworm-security
	// SignedBy is the file with the keys that may sign it; empty means Debian's.
	SignedBy string
}

// Archive is an apt state folder.
type Archive struct {
	// Say tells a person what is waited for; it may be nil.
	Say func(format string, args ...any)

	dir    string
	suites []Suite
}

// keyring is in package debian-archive-keyring, which Debian's apt depends on.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// HostSuites derives the suites of a Debian release (a code name such as
// "bookworm") and of others wanted from the mirrors in the host's own sources.
func HostSuites(ctx context.Context, release string, also ...string) ([]Suite, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").Output()
	if err != nil {
		return nil, fmt.Errorf("read the host's apt sources: %w", err)
	}
	var main, security string
	for line := range strings.Lines(string(out)) {
		uri, suite, ok := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case !ok:
		case strings.HasSuffix(suite, "-security"):
			security = uri
		case main == "" && strings.HasSuffix(strings.TrimSuffix(uri, "/"), "/debian"):
			main = uri
		}
	}
	if main == "" {
		return nil, fault.New(fault.NotFound, "no_mirror", "no Debian mirror among the host's apt sources").
			WithHint("name one: --mirror URL")
	}
	if security == "" {
		security = strings.TrimSuffix(main, "/") + "-security/"
	}
	return append([]Suite{{URI: main, Name: release}, {URI: main, Name: release + "-updates"}, {URI: security, Name: release + "-security"}},
		slices.Collect(func(yield func(Suite) bool) {
			for _, s := range also {
				if !yield(Suite{URI: main, Name: s}) {
					return
				}
			}
		})...), nil
}

// Open makes or reuses an apt state folder.
func Open(dir string, suites []Suite) (*Archive, error) {
	a := &Archive{dir: dir, suites: suites}
	for _, d := range []string{"lists/partial", "cache/archives/partial", "sources", "preferences"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var sources strings.Builder
	for _, s := range suites {
		fmt.Fprintf(&sources, "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n", s.URI, s.Name, cmp.Or(s.SignedBy, keyring))
	}
	conf := fmt.Sprintf(`Dir::State %q;
Dir::State::lists %q;
Dir::State::status %q;
Dir::Cache %q;
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts %q;
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts %q;
Acquire::Languages "none";
`, dir, a.path("lists"), a.path("status"), a.path("cache"), a.path("sources"), a.path("preferences"))
	// apt re-creates all of these; a torn one is written again at the next call.
	for name, content := range map[string]string{"apt.conf": conf, "status": "", "sources/klatch.sources": sources.String()} {
		if old, err := os.ReadFile(a.path(name)); err == nil && string(old) == content {
			continue
		}
		if err := os.WriteFile(a.path(name), []byte(content), 0o644); err != nil { //nolint:forbidigo // see above
			return nil, err
		}
		if name != "status" {
			_ = os.Remove(a.path("updated"))
		}
	}
	return a, nil
}

func (a *Archive) path(name string) string { return filepath.Join(a.dir, name) }

// distrusted is what apt says when a signature, a digest, a size or a date is
// wrong (apt-pkg/acquire-item.cc, methods/gpgv.cc).
var distrusted = regexp.MustCompile(`Hash Sum mismatch|File has unexpected size|NO_PUBKEY|BADSIG|EXPKEYSIG|REVKEYSIG|` +
	`is not signed|not signed by|signatures? (?:were|was|is|couldn't be) (?:invalid|verified)|isn't signed|NODATA|no longer signed|` +
	`is expired|is not valid yet|Clearsigned file`)

// apt runs one of apt's programs with this state.
func (a *Archive) apt(ctx context.Context, dir string, argv ...string) ([]byte, error) {
	// The host's settings are read after our file, the command line last.
	var secure []string
	for _, o := range []string{"APT::Get::AllowUnauthenticated", "Acquire::AllowInsecureRepositories",
		"Acquire::AllowDowngradeToInsecureRepositories", "Acquire::AllowWeakRepositories"} {
		secure = append(secure, "-o", o+"=false")
	}
	// Images of containers turn apt's own caches off; without, each question
	// parses all lists again (measured: 1.3 s of CPU time, with 0.02 s).
	for _, c := range []string{"pkgcache", "srcpkgcache"} {
		secure = append(secure, "-o", "Dir::Cache::"+c+"="+c+".bin")
	}
	cmd := exec.CommandContext(ctx, argv[0], append(secure, argv[1:]...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.path("apt.conf"), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(lastLines(complaint.String(), 4))
		if distrusted.MatchString(complaint.String()) {
			return nil, fault.New(fault.Untrusted, "archive_untrusted", "%s: %s: %w", strings.Join(argv, " "), text, err).
				WithHint("the mirror is broken, half updated, or somebody changes what it sends: try again later, then use another mirror")
		}
		return nil, fault.New(fault.Unavailable, "archive", "%s: %s: %w", strings.Join(argv, " "), text, err).
			WithHint("look at the network and at the host's apt sources, then run the command again")
	}
	return out.Bytes(), nil
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// Package is one version of a package in the archive.
type Package struct {
	Name    string
	Version string
	Bytes   int64
	SHA256  string
	Depends string
	Control string // its whole stanza in the signed package lists
}

// Versions lists what the archive has of a package, newest first.
func (a *Archive) Versions(ctx context.Context, name string) ([]Package, error) {
	out, err := a.apt(ctx, a.dir, "apt-cache", "show", name)
	if err != nil {
		if strings.Contains(err.Error(), "No packages found") {
			return nil, fault.New(fault.NotFound, "no_package", "the archive has no package %s", name)
		}
		return nil, err
	}
	return parseStanzas(out)
}

// Find returns one version of a package; an empty version means the newest.
func (a *Archive) Find(ctx context.Context, name, version string) (Package, error) {
	all, err := a.Versions(ctx, name)
	if err != nil {
		return Package{}, err
	}
	var have []string
	for _, p := range all {
		if version == "" || p.Version == version {
			return p, nil
		}
		have = append(have, p.Version)
	}
	return Package{}, fault.New(fault.NotFound, "no_version", "the archive has no version %s of %s", version, name).
		WithHint("it has %s", strings.Join(have, ", "))
}

func parseStanzas(b []byte) ([]Package, error) {
	var all []Package
	var p Package
	var control strings.Builder
	flush := func() {
		if p.Name != "" {
			p.Control = control.String()
			all = append(all, p)
		}
		p = Package{}
		control.Reset()
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		key, value, ok := strings.Cut(line, ": ")
		if line != "" {
			control.WriteString(line + "\n")
		}
		switch {
		case line == "":
			flush()
		case !ok || strings.HasPrefix(line, " "):
		case key == "Package":
			p.Name = value
		case key == "Version":
			p.Version = value
		case key == "Depends":
			p.Depends = value
		case key == "SHA256":
			p.SHA256 = value
		case key == "Size":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("size of package %s: %w", p.Name, err)
			}
			p.Bytes = n
		}
	}
	flush()
	return all, sc.Err()
}

// Missing says how many bytes Download would have to fetch.
func (a *Archive) Missing(ps []Package) (int64, error) {
	var n int64
	for _, p := range ps {
		have, err := a.have(p)
		if err != nil {
			return 0, err
		}
		if !have {
			n += p.Bytes
		}
	}
	return n, nil
}

// File is where Download puts a package.
func (a *Archive) File(p Package) string {
	return filepath.Join(a.dir, "debs", p.SHA256[:16]+"-"+p.Name+".deb")
}

func (a *Archive) have(p Package) (bool, error) {
	st, err := os.Stat(a.File(p))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && st.Size() == p.Bytes, err
}

// Download fetches what is missing, checks every digest against the signed
// package lists, and moves whole files into place; it may be repeated.
func (a *Archive) Download(ctx context.Context, ps []Package, progress Progress) error {
	var total, done int64
	var want []Package
	for _, p := range ps {
		have, err := a.have(p)
		if err != nil {
			return err
		}
		if !have {
			want = append(want, p)
			total += p.Bytes
		}
	}
	if len(want) == 0 {
		return nil
	}
	if err := os.MkdirAll(a.path("debs"), 0o755); err != nil {
		return err
	}
	for len(want) > 0 {
		n, size := batch(want)
		if err := a.download(ctx, want[:n], func(now int64) { progress(want[0].Name, done+now, total) }); err != nil {
			return err
		}
		done += size
		want = want[n:]
	}
	progress("", total, total)
	return nil
}

// maxBatch is how many bytes of packages one call of apt fetches, unless a
// single one is larger: what a killed call had is fetched again.
const maxBatch = 64 << 20

func batch(ps []Package) (n int, size int64) {
	for n < len(ps) && (n == 0 || size+ps[n].Bytes <= maxBatch) {
		size += ps[n].Bytes
		n++
	}
	return n, size
}

func (a *Archive) download(ctx context.Context, ps []Package, progress func(int64)) error {
	if err := a.removeOldParts(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(a.path("debs"), ".part-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // scratch
	if err := giveToApt(dir); err != nil {
		return err
	}
	stop := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				progress(folderSize(dir))
			}
		}
	}()
	argv := []string{"apt-get", "-q", "download"}
	for _, p := range ps {
		argv = append(argv, p.Name+"="+p.Version)
	}
	_, err = a.apt(ctx, dir, argv...)
	close(stop)
	<-watched
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(files) != len(ps) {
		return fmt.Errorf("download %d packages from %s on: got %d files", len(ps), ps[0].Name, len(files))
	}
	return a.takeIn(files, ps)
}

// takeIn moves downloaded files into place, each where its digest says.
func (a *Archive) takeIn(files []string, ps []Package) error {
	want := map[string]Package{}
	for _, p := range ps {
		want[p.SHA256] = p
	}
	for _, f := range files {
		got, err := FileSHA256(f)
		if err != nil {
			return err
		}
		p, ok := want[got]
		if !ok {
			return fault.New(fault.Untrusted, "package_digest", "downloaded file %s: SHA-256 %s is not in the signed lists", filepath.Base(f), got)
		}
		if err := os.Rename(f, a.File(p)); err != nil {
			return err
		}
	}
	return nil
}

// giveToApt lets apt's unprivileged download user write here, where there is one.
func giveToApt(dir string) error {
	u, err := user.Lookup("_apt")
	if err != nil || os.Getuid() != 0 {
		return os.Chmod(dir, 0o755)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return err
	}
	return errors.Join(os.Chown(dir, uid, -1), os.Chmod(dir, 0o755))
}

func folderSize(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if st, err := d.Info(); err == nil {
				n += st.Size()
			}
		}
		return nil
	})
	return n
}

// FileSHA256 is the digest of a file, in hexadecimal.
func FileSHA256(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Kernels lists the kernel releases of one flavor that the archive has, in
// apt's order.
func (a *Archive) Kernels(ctx context.Context, flavor string) ([]string, error) {
	out, err := a.apt(ctx, a.dir, "apt-cache", "pkgnames", "linux-image-")
	if err != nil {
		return nil, err
	}
	var all []string
	for line := range strings.Lines(string(out)) {
		name := strings.TrimPrefix(strings.TrimSpace(line), "linux-image-")
		if name != "" && name[0] >= '0' && name[0] <= '9' && strings.HasSuffix(name, "-"+flavor) {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all, nil
}
