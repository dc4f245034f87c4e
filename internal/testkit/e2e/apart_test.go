// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/machine/agent"
)

// Networks of TestVMServerApart: addresses for documentation (RFC 5737).
const (
	publisherNet, publisherAddress = "klatch-e2e-pub", "192.0.2.1"
	serverNet, serverAddress       = "klatch-e2e-srv", "192.0.2.2"
	hostAddress, serverOutside     = "198.51.100.1", "198.51.100.2"
)

// networks makes two network namespaces, one line between publisher and
// server, and one between server and machines. Machines do not reach the
// publisher.
func networks(t *testing.T) {
	t.Helper()
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	clean := func() { // also what a run that was killed has left
		for _, ns := range []string{publisherNet, serverNet} {
			_ = exec.Command("ip", "netns", "del", ns).Run() //nolint:noctx // at the end
		}
	}
	clean()
	t.Cleanup(clean)
	ip("netns", "add", publisherNet)
	ip("netns", "add", serverNet)
	ip("link", "add", "kl-pub", "netns", publisherNet, "type", "veth", "peer", "name", "kl-srv", "netns", serverNet)
	ip("link", "add", "kl-host", "type", "veth", "peer", "name", "kl-out", "netns", serverNet)
	ip("-n", publisherNet, "addr", "add", publisherAddress+"/24", "dev", "kl-pub")
	ip("-n", serverNet, "addr", "add", serverAddress+"/24", "dev", "kl-srv")
	ip("-n", serverNet, "addr", "add", serverOutside+"/24", "dev", "kl-out")
	ip("addr", "add", hostAddress+"/24", "dev", "kl-host")
	for _, up := range [][]string{{"-n", publisherNet, "link", "set", "kl-pub", "up"}, {"-n", serverNet, "link", "set", "kl-srv", "up"},
		{"-n", serverNet, "link", "set", "kl-out", "up"}, {"-n", serverNet, "link", "set", "lo", "up"}, {"link", "set", "kl-host", "up"}} {
		ip(up...)
	}
}

// servePublisher serves the repository by plain HTTP: it is signed.
func servePublisher(t *testing.T, dir string) (url string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "ip", "netns", "exec", publisherNet, self)
	cmd.Env = append(os.Environ(), serveFolder+"="+dir, serveAddress+"="+publisherAddress+":8000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	ended, err := startWithUs(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("publisher's web server says %q, %v", line, err)
	}
	return "http://" + publisherAddress + ":8000"
}

// TestVMServerApart: publisher, server and machine have no disk in common; the
// server gets the repository through a network and holds nothing else of the
// publisher. Then the server is lost with all it had and made anew from what
// is published: what the machine has loaded stays loaded meanwhile, and after
// it has enrolled again it gets the next livepatch.
func TestVMServerApart(t *testing.T) {
	m := everything(t)
	p := newPublisher(t, "e2e", m)
	networks(t)
	p.release(1, p.livepatch(1))
	upstream := servePublisher(t, p.Dir)

	newOne := func() *server {
		s := newServer(t, m)
		s.netns, s.listen = serverNet, serverOutside+":8443"
		s.init(p, serverOutside)
		s.sync(upstream)
		s.start()
		return s
	}
	first := newOne()
	g := bootMachine(t, m, p)
	g.install(quick)
	address := fmt.Sprintf("https://%s:%s", serverOutside, first.fleet)
	join := func(s *server) {
		g.sh("echo " + string(s.token()) + " | klatch enroll --server " + address + " --token-file -")
	}
	join(first)
	g.confirmed(1)
	if res := g.try("bash", "-c", "exec 3<>/dev/tcp/"+publisherAddress+"/8000"); res.Exit == 0 {
		t.Error("the machine reaches the publisher by itself: the test shows nothing")
	}
	for _, name := range keysOf(t, first.data) {
		if strings.HasPrefix(name, "ca.") || strings.HasPrefix(name, "server") {
			continue // its own
		}
		t.Errorf("the server holds a key: %s", name)
	}

	first.stop()
	if err := os.RemoveAll(first.data); err != nil {
		t.Fatal(err)
	}
	before := g.footprint()
	g.try("klatch", "check")
	second := newOne()
	g.try("klatch", "check")
	s := g.until("aware of a stranger", func(s agent.Status) bool { return s.Check.Code == "server_untrusted" })
	if s.State.Sequence != 1 || s.State.Highest != 1 || g.footprint() != before {
		t.Errorf("what was loaded changed: %+v", s.State)
	}
	g.run("systemctl", "stop", "klatchd.service")
	g.run("rm", "/var/lib/klatch/identity.json")
	g.run("systemctl", "start", "klatchd.service")
	join(second)
	p.release(2, p.livepatch(2))
	second.sync(upstream)
	g.confirmed(2)
	g.checks(false, false)
}

// keysOf lists the files of a folder that hold a private key.
func keysOf(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), "PRIVATE") {
			names = append(names, d.Name())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
