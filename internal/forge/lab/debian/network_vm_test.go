// SPDX-License-Identifier: Apache-2.0

//go:build vm

package debian_test

import (
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/debian"
)

// readGreeting reads one line from a port of the host with what bash offers.
const readGreeting = `exec 3<>/dev/tcp/` + lab.HostAddress + `/$PORT && read -t 5 line <&3 && echo "$line"`

func testNetwork(t *testing.T, rig lab.Rig, img debian.Image) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("greetings\n"))
			_ = c.Close()
		}
	}()
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	ask := func(m lab.Machine) string {
		t.Helper()
		run(t, m, "/lib/systemd/systemd-networkd-wait-online", "--timeout=60")
		res, err := m.Run(t.Context(), lab.Command{Argv: []string{"bash", "-c", readGreeting},
			Env: []string{"PORT=" + port}, Timeout: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(res.Stdout))
	}

	s := img.Spec("host only")
	s.Network = lab.HostOnly
	open := boot(t, rig, s)
	if got := ask(open); got != "greetings" {
		t.Errorf("host only: got %q", got)
	}
	if err := open.Link(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if got := run(t, open, "sh", "-c", "sleep 1; cat /sys/class/net/e*/carrier"); got != "0\n" {
		t.Errorf("carrier %q with the cable pulled", got)
	}
	if err := open.Link(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if got := ask(open); got != "greetings" {
		t.Errorf("after plugging in again: got %q", got)
	}
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	if got := ask(boot(t, rig, img.Spec("isolated"))); got != "" {
		t.Errorf("isolated guest got %q", got)
	}
}
