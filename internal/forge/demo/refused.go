// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// refused shows what a publisher sees where a fix cannot be livepatched: a
// change of a data type, made up here, which objects in memory do not have.
func (d *Demo) refused(ctx context.Context) error {
	trees, err := filepath.Glob(filepath.Join(d.Cache, "kernels", d.release+"_*", "tree"))
	if err != nil || len(trees) == 0 {
		return fault.New(fault.NotFound, "no_tree", "no prepared source of %s in the cache", d.release)
	}
	dir := filepath.Join(d.Work, "refused")
	var diff []byte
	for _, e := range [][3]string{
		{"include/net/af_unix.h", "\tstruct unix_address\t*addr;\n", "\tunsigned long\t\tlast_seen;\n"},
		{"net/unix/af_unix.c", "\tunix_remove_bsd_socket(sk);\n", "\tu->last_seen = jiffies;\n"},
	} {
		part, err := d.edit(ctx, filepath.Join(trees[0], e[0]), e)
		if err != nil {
			return err
		}
		diff = append(diff, part...)
	}
	if err := os.WriteFile(filepath.Join(d.Work, "fix.patch"), diff, 0o600); err != nil { //nolint:forbidigo // scratch
		return err
	}
	d.print("   a fix that adds a member to a type of which objects are in memory\n")
	if err := d.quietly(ctx, "init", dir, "--profile", "lab", "--publisher", "klatch-demo"); err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(dir, "catalog"), os.DirFS(filepath.Join(d.data(), "catalog"))); err != nil {
		return err
	}
	if err := d.quietly(ctx, "--dir", dir, "queue", "add", filepath.Join(d.Work, "fix.patch"), "--fixes", "CVE-2000-0001"); err != nil {
		return err
	}
	var said bytes.Buffer
	for _, args := range [][]string{{"queue", "lint", "--kernel", d.release}, {"build", "--kernel", d.release}} {
		said.Reset()
		args = append([]string{"--cache", d.Cache, "--dir", dir, "--quiet"}, args...)
		d.print("   $ %s\n", d.typed("klatch-forge", args))
		cmd := exec.CommandContext(ctx, d.program("klatch-forge"), args...)
		cmd.Stdout, cmd.Stderr = &said, &said
		err = cmd.Run()
		for line := range strings.Lines(said.String()) {
			d.print("     %s", strings.TrimRight(line, "\n")+"\n")
		}
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 3 || !strings.Contains(said.String(), "layout_changed") {
		return fmt.Errorf("the build should refuse the changed type: %w", err)
	}
	d.row("refused", "a changed data type, by name, member and offset, before anything was loaded")
	return nil
}

// edit makes a diff that puts a line after the first of its kind.
func (d *Demo) edit(ctx context.Context, path string, e [3]string) ([]byte, error) {
	old, err := durable.ReadFile(path, 4<<20)
	if err != nil {
		return nil, err
	}
	text := strings.Replace(string(old), e[1], e[1]+e[2], 1)
	if text == string(old) {
		return nil, fault.New(fault.NotFound, "no_change", "%s is not as the demo knows it", e[0])
	}
	now := filepath.Join(d.Work, "edited")
	if err := os.WriteFile(now, []byte(text), 0o600); err != nil { //nolint:forbidigo // scratch
		return nil, err
	}
	diff, err := exec.CommandContext(ctx, "diff", "-u", "--label", "a/"+e[0], "--label", "b/"+e[0], path, now).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		err = nil // status 1 is "they differ"
	}
	return diff, err
}

func (d *Demo) quietly(ctx context.Context, args ...string) error {
	return d.command(ctx, quietly, d.program("klatch-forge"), append([]string{"--cache", d.Cache}, args...)...)
}
