// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/guest"
)

// files are written into the tree as they are.
func files() map[string]string {
	return map[string]string{
		// An empty machine-id: each guest makes its own at its first boot and
		// keeps it, and systemd asks no first-boot questions.
		"etc/machine-id": "",
		"etc/hostname":   "lab-guest\n",
		"etc/hosts":      "127.0.0.1 localhost\n127.0.1.1 lab-guest\n" + lab.HostAddress + " lab-host\n",
		// The resolver of user-mode networking; silent on isolated machines.
		"etc/resolv.conf": "nameserver 10.0.2.3\noptions timeout:1 attempts:1\n",
		// The kernel has mounted the root disk already.
		"etc/fstab": "/dev/nvme0n1 / ext4 defaults 0 0\n/dev/nvme0n2 " + lab.FilesDir + " ext4 ro,nofail 0 0\n",
		"etc/systemd/network/20-lab.network": `[Match]
Type=ether

[Network]
DHCP=ipv4
IPv6AcceptRA=no
LinkLocalAddressing=no

[DHCPv4]
UseDomains=no
`,
		"etc/systemd/system/klatch-lab.service": `[Unit]
Description=Klatch lab agent
RequiresMountsFor=` + lab.FilesDir + `

[Service]
ExecStart=` + lab.FilesDir + "/" + guest.AgentName + `
Restart=always
RestartSec=1
OOMScoreAdjust=-1000
TasksMax=infinity
LimitNOFILE=65536
IgnoreSIGPIPE=no
Environment=HOME=/root LANG=C.UTF-8

[Install]
WantedBy=multi-user.target
`,
		// No modules for each feature of an emulated CPU (crypto, KVM): a second
		// of boot time for what no test uses.
		"etc/systemd/system/systemd-udev-trigger.service.d/lab.conf": `[Service]
ExecStart=
ExecStart=-udevadm trigger --type=all --action=add --prioritized-subsystem=module,block,tpmrm,net,tty,input --subsystem-nomatch=cpu
`,
		// The console is the kernel's; systemd speaks up only when it must.
		"etc/systemd/system.conf.d/lab.conf": "[Manager]\nShowStatus=error\nDefaultTimeoutStartSec=180s\n",
		"etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=32M\n" +
			"RateLimitIntervalSec=0\nForwardToConsole=no\n",
	}
}

// enabled units: link below /etc/systemd/system to the unit it starts.
func enabled() map[string]string {
	return map[string]string{
		"multi-user.target.wants/klatch-lab.service":                       "/etc/systemd/system/klatch-lab.service",
		"multi-user.target.wants/systemd-networkd.service":                 "/lib/systemd/system/systemd-networkd.service",
		"dbus-org.freedesktop.network1.service":                            "/lib/systemd/system/systemd-networkd.service",
		"sockets.target.wants/systemd-networkd.socket":                     "/lib/systemd/system/systemd-networkd.socket",
		"network-online.target.wants/systemd-networkd-wait-online.service": "/lib/systemd/system/systemd-networkd-wait-online.service",
	}
}

// masked units only cost time under emulation, or would take a line that is
// not theirs.
func masked() []string {
	return []string{
		"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "man-db.timer",
		"e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
		"getty@tty1.service", "getty-static.service", "serial-getty@ttyS0.service", "serial-getty@ttyS1.service",
		"systemd-pstore.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
		"systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "ldconfig.service",
		"systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-firstboot.service",
		"systemd-repart.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service",
		"sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "dev-hugepages.mount", "dev-mqueue.mount",
		"modprobe@configfs.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service",
		"modprobe@dm_mod.service", "modprobe@loop.service", "systemd-ask-password-console.path", "systemd-ask-password-wall.path",
	}
}

// settings makes the tree a lab guest.
func (b *builder) settings(src source) error {
	var errs []error
	for name, text := range files() {
		errs = append(errs, writeIn(b.tree, name, text))
	}
	errs = append(errs, writeIn(b.tree, "etc/apt/sources.list", fmt.Sprintf("deb %s %s main\n", src.mirror, b.cfg.Suite)))
	for link, to := range enabled() {
		errs = append(errs, linkIn(b.tree, link, to))
	}
	for _, unit := range masked() {
		errs = append(errs, linkIn(b.tree, unit, "/dev/null"))
	}
	for _, d := range []string{lab.FilesDir, "/var/log/journal"} {
		errs = append(errs, os.MkdirAll(filepath.Join(b.tree, d), 0o755))
	}
	// systemd would otherwise rebuild its caches at every first boot.
	for _, stamp := range []string{"etc/.updated", "var/.updated"} {
		errs = append(errs, writeIn(b.tree, stamp, ""))
	}
	return errors.Join(errs...)
}

// settingsSum makes the texts above part of the recipe.
func settingsSum() string {
	h := sha256.New()
	for _, m := range []map[string]string{files(), enabled()} {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			fmt.Fprintf(h, "%q %q\n", k, m[k]) //nolint:errcheck // a hash takes everything
		}
	}
	fmt.Fprintln(h, strings.Join(masked(), " "), diskSize) //nolint:errcheck // as above
	return hex.EncodeToString(h.Sum(nil))
}

func writeIn(tree, name, text string) error {
	path := filepath.Join(tree, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // a link of the package would be written through
	}
	return os.WriteFile(path, []byte(text), 0o644) //nolint:forbidigo // the tree is thrown away when anything goes wrong
}

func linkIn(tree, link, to string) error {
	path := filepath.Join(tree, "etc/systemd/system", link)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(to, path)
}
