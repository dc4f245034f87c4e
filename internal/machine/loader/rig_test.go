// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"crypto/rand"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loader"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/loaderclient"
	"klatch/internal/testkit/klpfake"
	"klatch/internal/testkit/signed"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

var running = kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-56-cloud-amd64", ID: kernel.BuildID{0xab, 1}}

// Keys are made once, because RSA keys take long.
var (
	ours      = sync.OnceValue(func() signed.Publisher { return newPublisher("klatch test") })
	strangers = sync.OnceValue(func() signed.Publisher { return newPublisher("stranger") })
)

func newPublisher(name string) signed.Publisher {
	p, err := signed.NewPublisher(name)
	if err != nil {
		panic(err)
	}
	return p
}

// rig is a machine: a fake kernel, a loader behind its socket, a client.
type rig struct {
	t      *testing.T
	dir    string
	kernel *klpfake.Kernel
	loader *loader.Loader
	client *loaderclient.Client
	socket string
	boots  int
}

func newRig(t *testing.T, changes ...func(*rig)) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "klatch-loader-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &rig{t: t, dir: dir, boots: 1, socket: filepath.Join(dir, "loader.sock")}
	r.check(os.Chmod(dir, 0o755)) // another uid must reach the socket
	for _, d := range []string{"kernel", "state", "etc"} {
		r.check(os.Mkdir(filepath.Join(dir, d), 0o700))
	}
	k, err := klpfake.New(filepath.Join(dir, "kernel"), running, "boot-1")
	r.check(err)
	r.kernel = k
	r.anchor(ours().Anchor())
	r.loader = &loader.Loader{
		Kernel: k, State: filepath.Join(dir, "state"), Etc: filepath.Join(dir, "etc"),
		Daemon: uint32(os.Getuid()), Log: slog.New(slog.DiscardHandler),
		Overdue: func() { t.Error("request passed its time limit") },
	}
	for _, change := range changes { // before anybody asks
		change(r)
	}
	r.serve()
	r.client = loaderclient.Dial(r.socket)
	return r
}

func (r *rig) check(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) anchor(a trust.Anchor) {
	r.t.Helper()
	b, err := trustsign.Anchor(a)
	r.check(err)
	r.write("etc/trust.json", b)
}

func (r *rig) write(name string, b []byte) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	r.check(os.WriteFile(path, b, 0o600))
	return path
}

func (r *rig) serve() {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	r.check(err)
	r.check(unix.Bind(fd, &unix.SockaddrUnix{Name: r.socket}))
	r.check(os.Chmod(r.socket, 0o777)) // the loader itself must refuse
	r.check(unix.Listen(fd, 16))
	l, err := loaderapi.On(fd)
	r.check(err)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for { // as systemd starts the loader again
			select {
			case <-stop:
				return
			default:
			}
			if err := r.loader.Serve(l, 10*time.Millisecond); err != nil {
				r.t.Errorf("serve: %v", err)
				return
			}
		}
	}()
	r.t.Cleanup(func() { close(stop); <-done; _ = l.Close() })
}

// lp is a livepatch in the making; its parts may be spoiled at each step.
type lp struct {
	words    []string
	module   []byte // signed
	manifest []byte // signed
}

type making struct {
	build    kernel.Build
	elf      func(words []string) []byte
	words    func([]string) []string
	by       signed.Publisher // signs the manifest
	moduleBy signed.Publisher
	unsigned bool
	noteBy   func(signed.Publisher) []note.Signer
	manifest func(*livepatch.Manifest)
}

// make builds and signs a livepatch; each change may spoil one step.
func (r *rig) make(n livepatch.Sequence, changes ...func(*making)) lp {
	r.t.Helper()
	m := making{build: running, by: ours(), moduleBy: ours(), elf: klpfake.Module,
		noteBy: func(p signed.Publisher) []note.Signer { return p.Signers[:2] }}
	for _, change := range changes {
		change(&m)
	}
	var out lp
	out.words = klpfake.Words(m.build, n)
	if m.words != nil {
		out.words = m.words(out.words)
	}
	out.module = m.elf(out.words)
	var err error
	if !m.unsigned {
		out.module, err = trustsign.Module(out.module, m.moduleBy.Module, m.moduleBy.Private, rand.Reader)
		r.check(err)
	}
	man := signed.Manifest(m.build, n, out.module)
	if m.manifest != nil {
		m.manifest(&man)
	}
	out.manifest, err = trustsign.Manifest(man, m.noteBy(m.by)...)
	r.check(err)
	return out
}

// load hands a livepatch over as klatchd does.
func (r *rig) load(p lp) (loaderapi.Status, error) {
	r.t.Helper()
	return r.loadFiles(r.write("given.manifest", p.manifest), r.write("given.ko", p.module))
}

func (r *rig) loadFiles(manifest, module string) (loaderapi.Status, error) {
	r.t.Helper()
	m, err := os.Open(manifest)
	r.check(err)
	defer m.Close()
	k, err := os.Open(module)
	r.check(err)
	defer k.Close()
	return r.client.Load(r.t.Context(), m, k)
}

// run loads and waits for the end of the transition.
func (r *rig) run(n livepatch.Sequence) {
	r.t.Helper()
	if _, err := r.load(r.make(n)); err != nil {
		r.t.Fatalf("load %d: %v", n, err)
	}
	r.settle(n)
}

// confirmed goes on to the confirmation.
func (r *rig) confirmed(n livepatch.Sequence) {
	r.t.Helper()
	r.run(n)
	_, err := r.client.Confirm(r.t.Context(), n)
	r.check(err)
}

func (r *rig) settle(n livepatch.Sequence) {
	r.t.Helper()
	for range 10 {
		st, err := r.client.Status(r.t.Context())
		r.check(err)
		if l := st.Loaded; l != nil && l.Sequence == n && !l.Transition {
			return
		}
	}
	r.t.Fatalf("sequence %d does not settle", n)
}

// reboot empties the kernel and runs the boot path, as the unit does.
func (r *rig) reboot() (outcome string, err error) {
	r.t.Helper()
	r.boots++
	r.check(r.kernel.Reboot(fmt.Sprintf("boot-%d", r.boots)))
	return r.loader.Boot()
}

func (r *rig) status() loaderapi.Status {
	r.t.Helper()
	st, err := r.client.Status(r.t.Context())
	r.check(err)
	return st
}

// snapshot is everything that a refusal may not change.
func (r *rig) snapshot() string {
	r.t.Helper()
	var all strings.Builder
	for _, d := range []string{"state", "kernel"} {
		r.check(filepath.WalkDir(filepath.Join(r.dir, d), func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || e.Name() == "lock" {
				return err
			}
			b, err := os.ReadFile(path)
			fmt.Fprintf(&all, "%s\n%q\n", path, b)
			return err
		}))
	}
	return all.String()
}

func wantCode(t *testing.T, err error, kind fault.Kind, code fault.Code) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.CodeOf(err) != code {
		t.Errorf("got %v (kind %s, code %q), want kind %s, code %q", err, fault.KindOf(err), fault.CodeOf(err), kind, code)
	}
}
