// SPDX-License-Identifier: Apache-2.0

// Package s3server runs a real object store for tests: versitygw over a
// folder, built from the module that tools/s3server pins. Tests only.
package s3server

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// Server is a running one. Its credentials are in the environment of the test.
type Server struct {
	Endpoint string
	Dir      string // a folder for each bucket
	t        testing.TB
	n        int
}

// program builds versitygw, or finds it in Go's cache.
var program = sync.OnceValues(func() (string, error) {
	_, here, _, _ := runtime.Caller(0)
	mod := filepath.Join(filepath.Dir(here), "..", "..", "..", "tools", "s3server", "go.mod")
	var stderr strings.Builder
	c := exec.CommandContext(context.Background(), "go", "tool", "-modfile="+mod, "-n", "versitygw")
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("build versitygw: %w\n%s", err, &stderr)
	}
	return strings.TrimSpace(string(out)), nil
})

// Start runs a store until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	path, err := program()
	check(t, err)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	check(t, err)
	address := l.Addr().String()
	check(t, l.Close())
	dir, sidecar := t.TempDir(), t.TempDir()
	c := exec.CommandContext(context.WithoutCancel(t.Context()), path, "--access", "test", "--secret", "testsecret", "--port", address, "posix", "--sidecar", sidecar, dir)
	var log strings.Builder
	c.Stdout, c.Stderr = &log, &log
	check(t, c.Start())
	t.Cleanup(func() {
		c.Process.Kill() //nolint:errcheck // it may have ended
		c.Wait()         //nolint:errcheck // killed
	})
	for end := time.Now().Add(time.Minute); ; {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
		if err == nil {
			check(t, conn.Close())
			break
		}
		if time.Now().After(end) {
			t.Fatalf("versitygw does not listen: %v\n%s", err, &log)
		}
		<-time.After(50 * time.Millisecond)
	}
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_EC2_METADATA_DISABLED": "true"} {
		if s, ok := t.(interface{ Setenv(string, string) }); ok {
			s.Setenv(name, value)
		}
	}
	return &Server{Endpoint: "http://" + address, Dir: dir, t: t}
}

// Bucket makes an empty bucket and gives the address of a prefix in it.
func (s *Server) Bucket() string {
	s.t.Helper()
	s.n++
	name := fmt.Sprintf("bucket-%d", s.n)
	check(s.t, os.Mkdir(filepath.Join(s.Dir, name), 0o700))
	return fmt.Sprintf("s3://%s/klatch?endpoint=%s&region=us-east-1&path_style=true", name, s.Endpoint)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
