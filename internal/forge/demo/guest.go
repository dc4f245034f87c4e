// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
	"klatch/internal/wire"
)

// machineConf makes the guest quick for a demo: a real machine asks hourly
// and soaks for a quarter of an hour.
const machineConf = "check_interval = \"30s\"\nsoak = \"5s\"\ntier = \"" + tier + "\"\n"

// machine boots the guest and shows that it has both flaws.
func (d *Demo) machine(ctx context.Context) error {
	debs, err := filepath.Glob(filepath.Join(d.Debs, "klatch_*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("find our package: %d files klatch_*.deb in %s; run make deb", len(debs), d.Debs)
	}
	spec := d.image.Spec("demo")
	spec.Network = lab.HostOnly
	spec.Files = []lab.File{
		{Name: "klatch.deb", Source: debs[0]},
		{Name: "trust.json", Source: filepath.Join(d.data(), "trust.json")},
		{Name: "rollout.json", Source: d.rolloutAnchor()},
		{Name: "demo.toml", Data: []byte(machineConf)},
	}
	for i, f := range Fixes {
		spec.Files = append(spec.Files, lab.File{Name: "check-" + f.CVE, Source: d.checks[i], Mode: 0o755})
	}
	done := d.step("boot Debian 12 with systemd and " + d.release)
	if d.guest, err = d.Rig.Boot(ctx, spec); err != nil {
		return err
	}
	if _, err := d.in(ctx, quietly, "systemctl", "is-system-running", "--wait"); err != nil {
		d.print("   (systemd says the guest is degraded; going on)\n")
	}
	done("")
	d.bootID = d.guest.BootID()
	out, err := d.in(ctx, shown, "uname", "-r")
	if err != nil {
		return err
	}
	if strings.TrimSpace(out) != d.release {
		return fmt.Errorf("the guest runs %q", out)
	}
	return d.flaws(ctx, "before", true, true)
}

// enroll installs our package and both anchors; the machine waits for its tier.
func (d *Demo) enroll(ctx context.Context) error {
	for _, c := range []struct {
		show bool
		argv []string
	}{
		{quietly, []string{"mkdir", "-p", "/etc/klatch/conf.d"}},
		{quietly, []string{"cp", lab.FilesDir + "/demo.toml", "/etc/klatch/conf.d/50-demo.toml"}},
		{shown, []string{"dpkg", "--install", lab.FilesDir + "/klatch.deb"}},
		{shown, []string{"klatch", "trust", "allow-lab"}},
		{shown, []string{"klatch", "trust", "install", lab.FilesDir + "/trust.json"}},
		{shown, []string{"klatch", "trust", "install-rollout", lab.FilesDir + "/rollout.json"}},
	} {
		if _, err := d.in(ctx, c.show, c.argv...); err != nil {
			return err
		}
	}
	token, err := d.token(ctx)
	if err != nil {
		return err
	}
	url := fmt.Sprintf("https://%s:%s", lab.HostAddress, d.server.port)
	d.print("   [guest] # klatch enroll --server %s --token-file -\n", url)
	res, err := d.guest.Run(ctx, lab.Command{Argv: []string{"klatch", "enroll", "--server", url, "--token-file", "-"}, Stdin: []byte(token)})
	if err != nil {
		return err
	}
	d.indent(res.Stdout)
	if res.Exit != 0 {
		return fmt.Errorf("enroll: %s", res.Stderr)
	}
	return d.waits(ctx)
}

// first opens the tier, and the machine takes livepatch 1.
func (d *Demo) first(ctx context.Context) error {
	if err := d.promote(ctx, "canaries are well with livepatch 1"); err != nil {
		return err
	}
	if err := d.await(ctx, 1); err != nil {
		return err
	}
	if err := d.flaws(ctx, "after livepatch 1", false, true); err != nil {
		return err
	}
	if err := d.klatch(ctx, "status"); err != nil {
		return err
	}
	return d.sameBoot(ctx)
}

func (d *Demo) token(ctx context.Context) (string, error) {
	d.print("   $ klatch-server token create --tier " + tier + "\n")
	cmd := exec.CommandContext(ctx, d.program("klatch-server"), "--data", filepath.Join(d.Work, "server"), "token", "create", "--tier", tier, "--json")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("make an enrollment token: %w", err)
	}
	var answer struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(out, &answer); err != nil {
		return "", fmt.Errorf("read the enrollment token: %w", err)
	}
	return answer.Token, nil
}

// reboot pulls the cable first: what comes back comes from the disk.
func (d *Demo) reboot(ctx context.Context) error {
	if err := d.guest.Link(ctx, false); err != nil {
		return err
	}
	done := d.step("reboot with the network cable pulled")
	before := d.guest.BootID()
	if err := d.guest.Reboot(ctx); err != nil {
		return err
	}
	done("")
	if d.guest.BootID() == before {
		return fmt.Errorf("the guest did not reboot: boot id %s", before)
	}
	d.bootID = d.guest.BootID()
	if err := d.beforeNetwork(ctx); err != nil {
		return err
	}
	out, err := d.in(ctx, shown, "cat", "/sys/kernel/livepatch/klatch_2/enabled")
	if err != nil {
		return err
	}
	if strings.TrimSpace(out) != "1" {
		return fmt.Errorf("livepatch 2 is not enabled after the reboot: %q", out)
	}
	if err := d.flaws(ctx, "after the reboot", false, false); err != nil {
		return err
	}
	d.row("the reboot", "with the cable pulled; livepatch 2 came from the disk, before the network")
	if err := d.guest.Link(ctx, true); err != nil {
		return err
	}
	return d.await(ctx, 2)
}

// beforeNetwork shows that the loader's boot unit was done before the network
// came up, by systemd's own clock.
func (d *Demo) beforeNetwork(ctx context.Context) error {
	var at [2]uint64
	for i, unit := range []string{"klatch-loader-boot.service", "systemd-networkd.service"} {
		out, err := d.in(ctx, quietly, "systemctl", "show", "--value", "--property=ActiveEnterTimestampMonotonic", unit)
		if err != nil {
			return err
		}
		if at[i], err = strconv.ParseUint(strings.TrimSpace(out), 10, 64); err != nil {
			return fmt.Errorf("start of %s: %w", unit, err)
		}
		d.print("   %-30s done %5.1f s after power-on\n", unit, float64(at[i])/1e6)
	}
	if at[0] == 0 || at[1] != 0 && at[0] > at[1] {
		return fmt.Errorf("the loader ran at %d, the network at %d microseconds", at[0], at[1])
	}
	return nil
}

// flaws runs both checks and wants these answers.
func (d *Demo) flaws(ctx context.Context, when string, want ...bool) error {
	var says []string
	for i, f := range Fixes {
		res, err := d.guest.Run(ctx, lab.Command{Argv: []string{lab.FilesDir + "/check-" + f.CVE}})
		if err != nil {
			return err
		}
		d.print("   [guest] # check-%s\n", f.CVE)
		d.indent(res.Stdout)
		if shows := res.Exit == 1; res.Exit > 1 || shows != want[i] {
			return fmt.Errorf("%s %s: check ended with status %d, wanted the flaw to show: %v: %s", f.CVE, when, res.Exit, want[i], res.Stderr)
		}
		says = append(says, f.CVE+map[bool]string{true: " shows", false: " fixed"}[want[i]])
	}
	d.row(when, "%s", strings.Join(says, ", "))
	return nil
}

func (d *Demo) sameBoot(ctx context.Context) error {
	out, err := d.in(ctx, quietly, "cat", "/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	if strings.TrimSpace(out) != d.bootID {
		return fmt.Errorf("the guest rebooted: boot id %s, before %s", strings.TrimSpace(out), d.bootID)
	}
	d.print("   same boot id as before: %s\n", d.bootID)
	return nil
}

// status is the part of klatch status --json that the story looks at.
type status struct {
	State wire.State `json:"state"`
}

// await waits until the machine says that a livepatch is confirmed.
func (d *Demo) await(ctx context.Context, seq livepatch.Sequence) error {
	done := d.step(fmt.Sprintf("wait for livepatch %d: verify, load, transition, soak (5 s here), confirm", seq))
	var seen []string
	deadline := time.Now().Add(3 * time.Minute)
	for {
		out, err := d.in(ctx, quietly, "klatch", "status", "--json")
		if err != nil {
			return err
		}
		var s status
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return fmt.Errorf("read status: %w", err)
		}
		if p := string(s.State.Phase); !slices.Contains(seen, p) {
			seen = append(seen, p)
		}
		settled := s.State.Phase == wire.Idle || s.State.Phase == wire.Confirmed
		if settled && s.State.Sequence == seq && s.State.Highest >= seq {
			done(strings.Join(seen, " → "))
			return nil
		}
		if time.Now().After(deadline) {
			log, _ := d.in(ctx, quietly, "journalctl", "--no-pager", "-n", "40", "-u", "klatchd", "-u", "klatch-loader", "-u", "klatch-loader-boot")
			return fmt.Errorf("livepatch %d was not confirmed: %s\n%s", seq, out, log)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// klatch runs the machine owner's tool in the guest.
func (d *Demo) klatch(ctx context.Context, args ...string) error {
	_, err := d.in(ctx, shown, append([]string{"klatch"}, args...)...)
	return err
}

// in runs a program in the guest; it must work.
func (d *Demo) in(ctx context.Context, show bool, argv ...string) (string, error) {
	if show {
		d.print("   [guest] # %s\n", strings.Join(argv, " "))
	}
	res, err := d.guest.Run(ctx, lab.Command{Argv: argv, Timeout: 2 * time.Minute})
	if err != nil {
		return "", err
	}
	if show {
		d.indent(res.Stdout)
	}
	if res.Exit != 0 {
		return string(res.Stdout), fmt.Errorf("in the guest: %s ended with status %d: %s", strings.Join(argv, " "), res.Exit, bytes.TrimSpace(res.Stderr))
	}
	return string(res.Stdout), nil
}

func (d *Demo) indent(b []byte) {
	for line := range strings.Lines(strings.TrimRight(string(b), "\n")) {
		d.print("     %s\n", strings.TrimRight(line, "\n"))
	}
}
