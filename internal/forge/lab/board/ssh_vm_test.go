// SPDX-License-Identifier: Apache-2.0

//go:build vm

package board_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/board"
	"klatch/internal/forge/lab/guest"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/testkit"
)

// sshInit is a board's own system, which knows nothing of Klatch: network,
// an SSH server, and that is all.
const sshInit = `#!/bin/busybox sh
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
for m in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net; do
	[ ! -e /modules/$m.ko ] || insmod /modules/$m.ko
done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
chmod 700 /root /root/.ssh
dropbear -r /etc/hostkey -s
while :; do sleep 1000; done
`

// newSSHBoard is a board whose agent is started through an SSH server, and
// whose kernel prints on a serial line of its own.
func newSSHBoard(t *testing.T) *emulated {
	t.Helper()
	testkit.Need(t, "dropbear", "virtio")
	e := newBoard(t)
	key, port := e.addSSH(t)
	e.write(t, "words", "console=ttyS0,115200 tsc=reliable no_timer_check")
	e.write(t, "options", fmt.Sprintf("-netdev user,id=n,hostfwd=tcp:127.0.0.1:%d-:22 -device virtio-net-pci,netdev=n,romfile=", port))
	e.file.Console = &board.Line{Socket: e.socket}
	e.file.Line = board.Line{Command: []string{"dbclient", "-y", "-y", "-T", "-i", key, "-p", fmt.Sprint(port), "root@127.0.0.1",
		"/usr/local/sbin/" + guest.AgentName + " -"}}
	return e
}

// TestBoardWithSSH: what is other than on a serial line. The answer and the
// console go different ways, and one of them can be cut alone.
func TestBoardWithSSH(t *testing.T) {
	e := newSSHBoard(t)
	a := newAdapter(t, e)
	e.file.Console.Socket = a.socket
	m := boot(t, e.rig(t, nil), spec())
	content := bytes.Repeat([]byte{0, 0xc0, 0xc1, '\n', 0xff}, 20_000)
	if err := m.Put(t.Context(), "/tmp/put", 0o640, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	res, err := m.Run(t.Context(), lab.Command{Argv: []string{"cat", "/tmp/put"}})
	if err != nil || !bytes.Equal(res.Stdout, content) {
		t.Errorf("%d bytes came back, want %d, %v", len(res.Stdout), len(content), err)
	}
	output(t, m, "for i in 1 2 3 4 5 6 7 8 9; do echo \"klatch test line $i\" > /dev/kmsg; done")
	before, err := m.Console()
	if err != nil || !strings.Contains(before, "klatch test line 9") {
		t.Errorf("the console is late, %v: %q", err, before[max(0, len(before)-200):])
	}
	id := m.BootID()
	_, err = m.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"}})
	if !errors.Is(err, lab.ErrGuestRebooted) {
		t.Errorf("a crash: %v", err)
	}
	if err := m.Await(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	text, cerr := m.Console()
	if v, troubles := lab.Judge(err, strings.TrimPrefix(text, before)); v != lab.Fail || cerr != nil {
		t.Errorf("verdict %s, %v, %+v", v, cerr, troubles)
	}
	a.pull()
	_, err = m.Console()
	labtest.Broken(t, err)
	if !strings.Contains(fmt.Sprint(err), "does not arrive") {
		t.Error("the console's cable is out, and the error does not say so")
	}
}

// TestSuiteWithSSH takes two minutes more, and shows nothing that the others
// do not show together.
func TestSuiteWithSSH(t *testing.T) {
	testkit.Need(t, "long")
	labtest.Run(t, newSSHBoard(t).rig(t, nil), spec())
}

// addSSH puts the server, the network's modules and the agent's program onto
// the board, and gives the key that opens it.
func (e *emulated) addSSH(t *testing.T) (key string, port int) {
	t.Helper()
	key = filepath.Join(e.dir, "key")
	out, err := exec.Command("dropbearkey", "-t", "ed25519", "-f", key).Output()
	if err != nil {
		t.Fatal(err)
	}
	public := regexp.MustCompile(`(?m)^ssh-ed25519 \S+`).Find(out)
	hostKey := filepath.Join(e.dir, "hostkey")
	if out, err := exec.Command("dropbearkey", "-t", "ed25519", "-f", hostKey).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	server, err := exec.LookPath("dropbear")
	if err != nil {
		t.Fatal(err)
	}
	libs, err := exec.Command("ldd", server).Output()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"usr/sbin/dropbear": server, "etc/hostkey": hostKey,
		"usr/local/sbin/" + guest.AgentName: labtest.GuestProgram(t)}
	for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(libs), -1) {
		files[strings.TrimPrefix(lib, "/")] = lib
	}
	modules, err := filepath.Glob(filepath.Join(filepath.Dir(testkit.Kernel()), "modules", "*.ko"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range modules {
		if name := filepath.Base(m); strings.HasPrefix(name, "virtio") || strings.HasSuffix(name, "failover.ko") {
			files["modules/"+name] = m
		}
	}
	content := map[string][]byte{"init": []byte(sshInit), "root/.ssh/authorized_keys": append(public, '\n')}
	for to, from := range files {
		if content[to], err = os.ReadFile(from); err != nil {
			t.Fatal(err)
		}
	}
	initrd := filepath.Join(e.dir, "initrd.cpio")
	old, err := os.ReadFile(initrd)
	if err != nil {
		t.Fatal(err)
	}
	// The kernel takes one archive after the other; the later file wins.
	if err := os.WriteFile(initrd, append(old, archive(t, content)...), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return key, l.Addr().(*net.TCPAddr).Port
}

func archive(t *testing.T, content map[string][]byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := cpio.NewWriter(&buf)
	dirs := map[string]bool{".": true}
	var mkdir func(string)
	mkdir = func(d string) {
		if dirs[d] {
			return
		}
		dirs[d] = true
		mkdir(path.Dir(d))
		if err := w.WriteHeader(&cpio.Header{Name: d, Mode: cpio.TypeDir | 0o755, Links: 2}); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range content {
		mkdir(path.Dir(name))
		mode := cpio.FileMode(0o755)
		if strings.HasSuffix(name, "key") || strings.HasSuffix(name, "keys") {
			mode = 0o600
		}
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: cpio.TypeReg | mode, Size: int64(len(c)), Links: 1}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
