// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"strings"
)

// option is one thing that a machine gets on the emulator's command line,
// and what the kernel must be told about it.
type option interface {
	args() []string
	kernelArgs() []string
}

// plain options have nothing to tell the kernel.
type plain struct{}

func (plain) kernelArgs() []string { return nil }

// bare is a machine without anything that was not asked for. It ends when
// the guest restarts, and the driver starts another one: an emulator that
// went through a reset keeps the translated code of the old kernel and is
// two to three times slower until it has thrown it away page by page
// (measured with 7.2: 25 s instead of 7 s to multi-user).
type bare struct{ plain }

func (bare) args() []string {
	return []string{"-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35",
		"-action", "reboot=shutdown"}
}

// accelerator is "tcg" or "kvm".
type accelerator string

func (a accelerator) args() []string {
	if a == accelKVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", "tcg,thread=multi", "-cpu", "max"}
}

// kernelArgs: an emulated machine's clocks disagree when the host is busy.
// Without the words the kernel would now and then call the TSC unstable, and
// spend a tenth of a second of every boot on finding out.
func (a accelerator) kernelArgs() []string {
	if a == accelKVM {
		return nil
	}
	return append([]string{"tsc=reliable", "no_timer_check"}, tscArgs()...)
}

// size of the machine.
type size struct {
	plain
	memoryMiB, cpus int
}

func (s size) args() []string {
	return []string{"-m", fmt.Sprintf("%dM", s.memoryMiB), "-smp", fmt.Sprint(s.cpus)}
}

// boot is the kernel with its initramfs and the end of its command line.
type boot struct {
	kernel, initrd string
	commandLine    []string
}

func (b boot) args() []string {
	args := []string{"-kernel", b.kernel, "-append", strings.Join(b.commandLine, " ")}
	if b.initrd != "" {
		args = append(args, "-initrd", b.initrd)
	}
	return args
}

func (boot) kernelArgs() []string { return nil }

// consoleFile is ttyS0, appended to a file.
type consoleFile string

func (c consoleFile) args() []string {
	return []string{"-chardev", "file,id=console,append=on,path=" + escape(string(c)),
		"-device", "isa-serial,chardev=console,index=0"}
}

// kernelArgs: a panic restarts the machine after a second, as on most
// servers; the agent's new boot id then tells whoever waits.
func (consoleFile) kernelArgs() []string {
	return []string{"console=ttyS0,115200", "panic=1", "printk.time=1"}
}

// agentLine is ttyS1: one end of a socket pair that the emulator inherits
// under this number.
type agentLine struct {
	plain
	fd int
}

func (a agentLine) args() []string {
	return []string{"-chardev", fmt.Sprintf("socket,id=agent,fd=%d", a.fd),
		"-device", "isa-serial,chardev=agent,index=1"}
}

// monitor is the QMP socket, also inherited.
type monitor struct {
	plain
	fd int
}

func (m monitor) args() []string {
	return []string{"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", m.fd),
		"-mon", "chardev=monitor,mode=control"}
}

// disks are the name spaces of one NVMe controller, in order: /dev/nvme0n1
// and so on. NVMe, because the stock cloud kernels have its driver built in
// while virtio's is a module: so no guest needs an initramfs made for it.
// One controller, because two may be numbered in either order.
type disks []disk

type disk struct {
	id, file, format string
	readOnly         bool
}

func (ds disks) args() []string {
	args := []string{"-device", "nvme,id=nvme0,serial=klatch-lab"}
	for i, d := range ds {
		drive := fmt.Sprintf("if=none,id=%s,file=%s,format=%s,discard=unmap", d.id, escape(d.file), d.format)
		if d.readOnly {
			drive += ",readonly=on"
		}
		args = append(args, "-drive", drive, "-device", fmt.Sprintf("nvme-ns,bus=nvme0,nsid=%d,drive=%s", i+1, d.id))
	}
	return args
}

// kernelArgs: the first disk is the root file system, which the kernel
// mounts itself.
func (disks) kernelArgs() []string {
	return []string{"root=/dev/nvme0n1", "rootfstype=ext4", "rw", "rootwait"}
}

// network is user-mode networking: no root, no bridge, nothing to clean up.
// Isolated answers DHCP and drops everything else. The open form makes the
// publisher's 127.0.0.1 reachable as 10.0.2.2.
//
// The finer way, restrict=on with guestfwd for single ports, was weighed: a
// guestfwd carries one connection for the life of the machine unless each
// connection starts a program, and the server's address would have to be
// known before the machine is.
type network struct {
	plain
	restricted bool
}

const netdevID = "net0"

func (n network) args() []string {
	restrict := "off"
	if n.restricted {
		restrict = "on"
	}
	return []string{"-netdev", "user,id=" + netdevID + ",ipv6=off,restrict=" + restrict,
		"-device", "virtio-net-pci,id=" + nicID + ",netdev=" + netdevID + ",romfile=,mac=52:54:00:6b:6c:61"}
}

const nicID = "nic0"

// escape doubles commas, which separate the parts of an option.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
