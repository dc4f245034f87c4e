// SPDX-License-Identifier: Apache-2.0

package klpbuild

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
)

// originalTimeout bounds the build of a whole kernel: a distribution's config
// takes hours on two cores.
const originalTimeout = 12 * time.Hour

// marker is what klp-build leaves when the unpatched kernel is complete.
const marker = "klp-tmp/1-orig/.complete"

// leastShare of the kernel's functions must be what the original build has:
// below it, the parts that somebody named are not of one kernel. Compiled in
// separate sections a few differ in how they jump; they are compared again
// where it matters.
const leastShare = 0.9

// Prepare builds the unpatched kernel once, as klp-build does, and compares
// it with the one that runs. It returns the comparison of all functions. A
// second call finds everything there.
func (d *Driver) Prepare(ctx context.Context, e catalog.Entry, step kerneltree.Step) (match.Report, error) {
	t := kerneltree.At(d.Cache, e)
	unlock, err := durable.Lock(filepath.Join(d.Cache, "kernels", "."+filepath.Base(t.Dir)+".lock"))
	if err != nil {
		return match.Empty(), err
	}
	defer unlock() //nolint:errcheck // nothing was written
	if !t.Ready() {
		done := step("build the unpatched kernel, once: as long as any kernel build")
		if err := d.original(ctx, t, e); err != nil {
			return match.Empty(), err
		}
		if err := t.FinishOwn(); err != nil {
			return match.Empty(), err
		}
		done("")
	}
	done := step("compare all functions with the running kernel's")
	r, err := compareAll(t)
	if err != nil {
		return r, err
	}
	done(fmt.Sprintf("%d of %d identical", r.Identical, r.Checked))
	if float64(r.Identical) < leastShare*float64(r.Checked) {
		var first match.Difference
		if len(r.Different) > 0 {
			first = r.Different[0]
		}
		return r, fault.New(fault.Untrusted, "other_build", "built here, only %d of %d functions are what vmlinux has; the first other one is %s in %s: %s",
			r.Identical, r.Checked, first.Function, first.File, first.Why).
			WithHint("source, config and vmlinux are not of one build, or it was built with flags of its own (KCFLAGS): see docs/howto/own-kernel.md")
	}
	return r, nil
}

// original runs klp-build with a source patch that changes nothing: it has no
// way to build the original only. That the patched kernel then is no other
// one, "no changes detected", also shows that builds can be repeated here.
func (d *Driver) original(ctx context.Context, t kerneltree.Tree, e catalog.Entry) error {
	const file = "init/main.c"
	old, err := durable.ReadFile(filepath.Join(t.Source(), file), 16<<20)
	if err != nil {
		return err
	}
	patch := filepath.Join(t.Dir, "nothing.patch")
	if err := durable.WriteFile(patch, commentAtEnd(file, old), 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, originalTimeout)
	defer cancel()
	res, err := sandbox.Run(ctx, sandbox.Command{Dir: t.Source(), Writable: []string{t.Source()}, Env: d.withCCache(environment(e)),
		Argv: []string{filepath.Join(t.Source(), script), "-T", "-o", "nothing.ko", patch}})
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(t.Dir, "original.log"), res.Output, 0o644); err != nil {
		return err
	}
	switch {
	case !regular(filepath.Join(t.Source(), marker)):
		return fault.New(fault.Internal, "klp_build", "build the unpatched kernel: %s", complaint(res.Output)).
			WithHint("the whole log is %s; packages are missing? in the source folder: tools/deps own", filepath.Join(t.Dir, "original.log"))
	case !bytes.Contains(res.Output, []byte(noChanges)):
		return fault.New(fault.Internal, "klp_build", "the same source, built again, is another kernel: %s", complaint(res.Output)).
			WithHint("the build depends on time or folder; look for what differs in klp-tmp of %s", t.Source())
	}
	return os.Remove(patch)
}

// withCCache lets the compiler look into the owner's ccache first. A kernel
// that was built with klp-build's own flags is then not compiled again.
func (d *Driver) withCCache(env []string) []string {
	if d.CCache == "" {
		return env
	}
	return append(env, "PATH="+ccachePath+":/usr/sbin:/usr/bin:/sbin:/bin", "CCACHE_DIR="+d.CCache, "CCACHE_READONLY=1", "CCACHE_DEPEND=1",
		"CCACHE_TEMPDIR=/run", "CCACHE_NOHASHDIR=1")
}

// ccachePath is where Debian's ccache package puts links named as the compilers.
const ccachePath = "/usr/lib/ccache"

// commentAtEnd makes a diff that adds a comment after the last line of a file.
func commentAtEnd(file string, content []byte) []byte {
	lines := bytes.Split(bytes.TrimSuffix(content, []byte("\n")), []byte("\n"))
	n := len(lines)
	var b bytes.Buffer
	fmt.Fprintf(&b, "--- a/%s\n+++ b/%s\n@@ -%d,3 +%d,4 @@\n", file, file, n-2, n-2)
	for _, l := range lines[n-3:] {
		fmt.Fprintf(&b, " %s\n", l)
	}
	b.WriteString("+/* the end */\n")
	return b.Bytes()
}

// compareAll compares every function of the original build with the kernel
// that runs, and those of modules where their files are known.
func compareAll(t kerneltree.Tree) (match.Report, error) {
	r := match.Empty()
	units, err := t.Units()
	if err != nil {
		return r, err
	}
	j := &job{tree: t, units: units, images: map[string]*match.Image{}}
	for _, u := range units.Units {
		if filepath.Ext(u.Source) != ".c" {
			continue
		}
		image, err := j.image(u.Object)
		if err != nil {
			return r, err
		}
		file := filepath.Join(t.Source(), u.Target)
		if image == nil || !regular(file) || u.Object == vmlinux && !image.HasFile(u.Source) {
			continue // not linked: a step on the way, or a module whose file nobody named
		}
		if err := image.Object(file, u.Source, nil, &r); err != nil {
			return r, err
		}
	}
	return r, nil
}
