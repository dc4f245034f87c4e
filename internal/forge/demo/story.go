// SPDX-License-Identifier: Apache-2.0

// Package demo tells the whole story once, with the real programs: a real fix
// becomes a livepatch for a stock Debian kernel, a real Debian machine (in a
// VM) enrolls, loads it and reports it; a second livepatch replaces the first;
// after a reboot it is back without the network.
//
// Read Run: it is the story, one chapter per line. Every chapter checks what
// it claims; a claim that does not hold ends the demo with an error.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/debian"
	"klatch/internal/livepatch"
	"klatch/internal/wire"
)

// Fix is one real fix with the program that shows the flaw.
type Fix struct {
	CVE      string
	File     string
	Function string
	Says     string // what it is about, for the story
	Check    string // package of the check program, in this repository
}

// Fixes are the demo's two: small, real, and visible from user space.
var Fixes = []Fix{
	{"CVE-2026-52928", "net/unix/af_unix.c", "unix_ioctl", "af_unix: SIOCATMARK on a non-stream socket", "./lab/checks/cve-2026-52928"},
	{"CVE-2026-93146", "kernel/time/namespace.c", "proc_timens_set_offset", "time namespaces: nanoseconds out of range", "./lab/checks/cve-2026-93146"},
}

// Kernels are the stock kernels that have both flaws, best first: Debian
// removes old ones from its archive.
var Kernels = []string{"6.1.0-50-cloud-amd64", "6.1.0-49-cloud-amd64", "6.1.0-48-cloud-amd64", "6.1.0-47-cloud-amd64"}

// Demo is what the story needs.
type Demo struct {
	Source  string // this repository
	Bin     string // folder of the six programs
	Debs    string // folder of our packages
	Work    string // folder that the demo may fill, and removes
	Cache   string
	Keep    bool // leave server and guest running until interrupted
	Rig     lab.Rig
	Archive *archive.Archive
	Out     io.Writer

	mu      sync.Mutex
	start   time.Time
	kernel  archive.Package
	release string
	newest  string // version of the source package with both fixes
	checks  []string
	image   debian.Image
	server  *server
	guest   lab.Machine
	bootID  string
	rows    [][2]string // the summary
}

// chapter is one part of the story.
type chapter struct {
	title string
	tell  func(context.Context) error
}

// Run tells the story.
func (d *Demo) Run(ctx context.Context) (err error) {
	d.start = time.Now()
	defer func() { err = errors.Join(err, d.end()) }()
	for i, c := range []chapter{
		{"A stock Debian kernel, its source, and a Debian machine that runs it", d.prepare},
		{"The publisher turns a real fix into a livepatch and proves it", func(ctx context.Context) error { return d.livepatch(ctx, 1) }},
		{"What cannot be livepatched is refused, with the place and the reason", d.refused},
		{"A server hands it out", d.serve},
		{"A machine boots: it has the flaw", d.machine},
		{"The machine enrolls, and waits: nobody has opened its tier", d.enroll},
		{"The tier is opened; the machine verifies, loads and reports", d.first},
		{"A second, cumulative livepatch with both fixes replaces the first", d.second},
		{"The machine reboots without network: the livepatch is back", d.reboot},
	} {
		d.print("\n%d. %s\n", i+1, c.title)
		began := time.Now()
		if err := c.tell(ctx); err != nil {
			return fmt.Errorf("chapter %d: %w", i+1, err)
		}
		d.print("   (%.1f s)\n", time.Since(began).Seconds())
	}
	return d.summary(ctx)
}

func (d *Demo) print(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintf(d.Out, format, args...) //nolint:errcheck // the story's reader
}

// step prints what is being waited for, and how long it took.
func (d *Demo) step(what string) func(note string) {
	start := time.Now()
	d.print("   %s …\n", what)
	return func(note string) {
		if note != "" {
			note = ": " + note
		}
		d.print("   %s%s (%.1f s)\n", what, note, time.Since(start).Seconds())
	}
}

func (d *Demo) row(name, format string, args ...any) {
	d.rows = append(d.rows, [2]string{name, fmt.Sprintf(format, args...)})
}

// prepare chooses a kernel by looking at what the archive has, then makes the
// publisher's tree and the guest's disk side by side.
func (d *Demo) prepare(ctx context.Context) error {
	if err := d.choose(ctx); err != nil {
		return err
	}
	if err := d.forge(ctx, "init", d.data(), "--profile", "lab", "--publisher", "klatch-demo"); err != nil {
		return err
	}
	none := func(string, int64, int64) {}
	if err := d.Archive.Download(ctx, []archive.Package{d.kernel}, none); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The first that fails stops the other, whose end then says nothing.
	failed := make(chan error, 2)
	for _, half := range []func(context.Context) error{d.makeImage, func(ctx context.Context) error {
		return d.forge(ctx, "--dir", d.data(), "kernel", "add", "--distro", "debian", "--release", d.release)
	}} {
		go func() { failed <- half(ctx) }()
	}
	first := <-failed
	if first != nil {
		cancel()
	}
	if second := <-failed; first == nil {
		first = second
	}
	if first != nil {
		return first
	}
	return d.buildChecks(ctx)
}

func (d *Demo) choose(ctx context.Context) error {
	have, err := d.Archive.Kernels(ctx, "cloud-amd64")
	if err != nil {
		return err
	}
	i := slices.IndexFunc(Kernels, func(k string) bool { return slices.Contains(have, k) })
	if i < 0 {
		return fault.New(fault.NotFound, "no_kernel", "none of the demo's kernels is in Debian's archive any more: %s", strings.Join(Kernels, ", ")).
			WithHint("the archive has %s; add one with fixes of your own: docs/tutorial/first-livepatch.md", strings.Join(have, ", "))
	}
	d.release = Kernels[i]
	if d.kernel, err = d.Archive.Find(ctx, "linux-image-"+d.release, ""); err != nil {
		return err
	}
	source, err := d.Archive.Find(ctx, "linux-source-6.1", "")
	if err != nil {
		return err
	}
	d.newest = source.Version
	d.print("   kernel %s (Debian %s); the fixes come from Debian's %s\n", d.release, d.kernel.Version, d.newest)
	return nil
}

func (d *Demo) makeImage(ctx context.Context) error {
	var done func(string)
	image, err := debian.Build(ctx, debian.Config{Suite: "bookworm", KernelDeb: d.Archive.File(d.kernel),
		Cache: filepath.Join(d.Cache, "images"),
		Progress: func(s debian.Step) {
			if !s.Done {
				done = d.step("Debian guest: " + s.Name + " " + s.What)
			} else if done != nil {
				done("")
			}
		}})
	if image.Cached {
		d.print("   Debian guest: the image is in the cache\n")
	}
	d.image = image
	return err
}

// buildChecks compiles the small programs that show the flaws.
func (d *Demo) buildChecks(ctx context.Context) error {
	for _, f := range Fixes {
		out := filepath.Join(d.Work, "check-"+f.CVE)
		if err := d.command(ctx, quietly, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, f.Check); err != nil {
			return err
		}
		d.checks = append(d.checks, out)
	}
	return nil
}

// livepatch makes sequence n, which holds the first n fixes.
func (d *Demo) livepatch(ctx context.Context, n int) error {
	f := Fixes[n-1]
	d.print("   %s: %s\n", f.CVE, f.Says)
	began := time.Now()
	for _, args := range [][]string{
		{"queue", "import", "--kernel", d.release, "--to", d.newest, "--file", f.File, "--function", f.Function,
			"--fixes", f.CVE, "--check", d.checks[n-1]},
		{"build", "--kernel", d.release},
		{"test", "--kernel", d.release},
		{"sign", "--kernel", d.release},
		{"publish"},
	} {
		if err := d.forge(ctx, append([]string{"--dir", d.data()}, args...)...); err != nil {
			return err
		}
	}
	if err := d.forge(ctx, "evidence", "verify", filepath.Join(d.data(), "repository"), "--anchor", filepath.Join(d.data(), "trust.json"),
		"--kernel", d.release, "--sequence", strconv.Itoa(n)); err != nil {
		return err
	}
	d.row(fmt.Sprintf("livepatch %d", n), "from source diff to published, built, proved and tested in a VM, in %.0f s", time.Since(began).Seconds())
	d.row(fmt.Sprintf("evidence %d", n), "a stranger with the published files and the anchor accepts it (one lab key signed all of it)")
	return nil
}

func (d *Demo) second(ctx context.Context) error {
	if err := d.livepatch(ctx, 2); err != nil {
		return err
	}
	if err := d.sync(ctx); err != nil {
		return err
	}
	if err := d.selects(ctx, 2); err != nil {
		return err
	}
	if err := d.promote(ctx, "canaries are well with livepatch 2"); err != nil {
		return err
	}
	if err := d.await(ctx, 2); err != nil {
		return err
	}
	if err := d.flaws(ctx, "after livepatch 2", false, false); err != nil {
		return err
	}
	return d.sameBoot(ctx)
}

// serve starts a server that holds no key of the publisher.
func (d *Demo) serve(ctx context.Context) error {
	dir := filepath.Join(d.Work, "server")
	if err := d.command(ctx, shown, d.program("klatch-server"), "--data", dir, "init", "--name", lab.HostAddress, "--name", "127.0.0.1",
		"--anchor", filepath.Join(d.data(), "trust.json"), "--allow-lab", "--admin-token-file", d.adminToken()); err != nil {
		return err
	}
	if err := d.operator(ctx); err != nil {
		return err
	}
	if err := d.sync(ctx); err != nil {
		return err
	}
	s, err := startServer(ctx, d.program("klatch-server"), dir, filepath.Join(d.Work, "server.log"))
	if err != nil {
		return err
	}
	d.server = s
	d.print("   machines: %s\n   page:     %s\n", s.fleet, s.admin)
	return nil
}

func (d *Demo) sync(ctx context.Context) error {
	return d.command(ctx, shown, d.program("klatch-server"), "--data", filepath.Join(d.Work, "server"), "sync",
		"--from", filepath.Join(d.data(), "repository"))
}

// data is the publisher's folder.
func (d *Demo) data() string { return filepath.Join(d.Work, "publisher") }

func (d *Demo) program(name string) string { return filepath.Join(d.Bin, name) }

// summary ends the story with a table that a person understands.
func (d *Demo) summary(ctx context.Context) error {
	m, err := d.server.machine(ctx, d.adminToken(), wire.Confirmed, livepatch.Sequence(2))
	if err != nil {
		return err
	}
	var fixes []string
	for _, f := range m.State.Fixes {
		fixes = append(fixes, fmt.Sprintf("%s (check %s)", f.CVE, f.Check))
	}
	d.print("\nThe server says of the machine\n")
	for _, r := range [][2]string{
		{"machine", m.Facts.Hostname + ", " + m.MachineID}, {"kernel", m.Facts.Kernel.String()},
		{"livepatch", fmt.Sprintf("sequence %d", m.State.Sequence)}, {"fixed live", strings.Join(fixes, ", ")},
		{"state", m.State.State + ": " + m.State.Text}, {"next step", m.State.NextStep},
	} {
		d.print("   %-18s %s\n", r[0], r[1])
	}
	d.print("\nWhat was shown\n")
	d.row("all of it", "%.0f s", time.Since(d.start).Seconds())
	for _, r := range d.rows {
		d.print("   %-18s %s\n", r[0], r[1])
	}
	token, err := os.ReadFile(d.adminToken())
	if err != nil {
		return err
	}
	if !d.Keep {
		d.print("\nThe page was at %s. To look at it: make demo KEEP=1\n", d.server.admin)
		return nil
	}
	d.print("\nThe page: %s  (user admin, password %s)\nServer and guest run until you press Ctrl-C.\n", d.server.admin, strings.TrimSpace(string(token)))
	<-ctx.Done()
	return nil
}

// end stops what runs and removes what was made; the cache stays.
func (d *Demo) end() error {
	var errs []error
	if d.guest != nil {
		errs = append(errs, d.guest.Close())
	}
	if d.server != nil {
		errs = append(errs, d.server.stop())
	}
	return errors.Join(append(errs, os.RemoveAll(d.Work))...)
}
