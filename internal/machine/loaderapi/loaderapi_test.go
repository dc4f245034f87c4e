// SPDX-License-Identifier: Apache-2.0

package loaderapi_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/loaderclient"
)

func listen(t *testing.T, path string) *loaderapi.Listener {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 8)); err != nil {
		t.Fatal(err)
	}
	l, err := loaderapi.On(fd)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// serve answers one connection with what the handler says.
func serve(t *testing.T, handle func(loaderapi.Request, []*os.File) (loaderapi.Answer, error)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "loader.sock")
	l := listen(t, path)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept(10 * time.Second)
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		defer c.Close()
		if c.UID != uint32(os.Getuid()) {
			t.Errorf("peer has uid %d", c.UID)
		}
		r, files, err := c.Receive()
		var a loaderapi.Answer
		if err == nil {
			a, err = handle(r, files)
			loaderapi.CloseFiles(files)
		}
		_ = c.Answer(a, err) // a hostile peer may be gone
	}()
	t.Cleanup(func() { <-done; _ = l.Close() })
	return path
}

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	var files []*os.File
	for _, name := range []string{"manifest", "module"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	want := loaderapi.Status{
		Kernel: kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}},
		Loaded: &loaderapi.Loaded{Sequence: 3, Enabled: true},
	}
	for range 6000 { // more fixes than a request could hold
		want.Loaded.Fixes = append(want.Loaded.Fixes, livepatch.Fix{CVE: "CVE-2026-1000", Check: livepatch.Passed})
	}
	path := serve(t, func(r loaderapi.Request, got []*os.File) (loaderapi.Answer, error) {
		if r.Op != loaderapi.OpLoad || len(got) != 2 {
			return loaderapi.Answer{}, fmt.Errorf("got %v with %d files", r, len(got))
		}
		for i, f := range got {
			b, err := io.ReadAll(f)
			if err != nil || string(b) != []string{"manifest", "module"}[i] {
				return loaderapi.Answer{}, fmt.Errorf("file %d holds %q: %w", i, b, err)
			}
			flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				return loaderapi.Answer{}, fmt.Errorf("file %d survives exec", i)
			}
		}
		return loaderapi.Answer{Status: want},
			fault.New(fault.Conflict, "sequence_same", "no: %w", errors.New("cause")).WithHint("do this")
	})
	got, err := loaderclient.Dial(path).Load(t.Context(), files[0], files[1])
	f, ok := errors.AsType[*fault.Error](err)
	if !ok || f.Kind != fault.Conflict || f.Code != "sequence_same" || f.Text != "no: cause" || f.Hint != "do this" {
		t.Fatalf("fault came over as %#v", err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("status came over as %+v", got)
	}
}

func TestLoaderAway(t *testing.T) {
	_, err := loaderclient.Dial(filepath.Join(t.TempDir(), "none.sock")).Status(t.Context())
	if fault.KindOf(err) != fault.Unavailable || fault.CodeOf(err) != "loader_unreachable" {
		t.Fatalf("got %v", err)
	}
}

func TestSilentLoader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "loader.sock")
	l := listen(t, path)
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := loaderclient.Dial(path).Status(ctx); !errors.Is(err, context.DeadlineExceeded) && fault.KindOf(err) != fault.Unavailable {
		t.Errorf("past the deadline: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := loaderclient.Dial(path).Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
}

// raw sends bytes and descriptors as a hostile peer would.
func raw(t *testing.T, path string, msg []byte, fds ...int) loaderapi.Answer {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := os.NewFile(uintptr(fd), "socket")
	defer s.Close()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(fd, msg, oob, nil, unix.MSG_NOSIGNAL); err != nil {
		t.Fatal(err)
	}
	_ = unix.Shutdown(fd, unix.SHUT_WR)
	reply, err := io.ReadAll(s)
	// Bytes that the loader did not read turn into a reset after its answer.
	if err != nil && !errors.Is(err, unix.ECONNRESET) || len(reply) < 4 {
		t.Fatalf("answer %q: %v", reply, err)
	}
	a, err := loaderclient.ParseAnswer(reply[4:])
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func framed(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestAttack(t *testing.T) {
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	n := int(null.Fd())
	load, status := `{"version":1,"op":"load"}`, `{"version":1,"op":"status"}`
	for _, tc := range []struct {
		name string
		msg  []byte
		fds  []int
		code fault.Code
	}{
		{"too many files", framed(load), []int{n, n, n}, "too_many_files"},
		{"far too many files", framed(load), slicesRepeat(n, 200), "too_many_files"},
		{"too few files", framed(load), []int{n}, "bad_request"},
		{"files where none belong", framed(status), []int{n, n}, "bad_request"},
		{"oversized message", framed(strings.Repeat("x", loaderapi.MaxMessage+1)), []int{n}, "message_size"},
		{"length of 4 GiB", []byte("\xff\xff\xff\xff{}"), nil, "message_size"},
		{"length of nothing", []byte{0, 0, 0, 0}, nil, "message_size"},
		{"length over the bytes sent", []byte("\x00\x00\x01\x00{}"), []int{n}, ""},
		{"half a length", []byte{0, 0}, nil, ""},
		{"unknown field", framed(`{"version":1,"op":"status","path":"/etc"}`), nil, "message_malformed"},
		{"repeated field", framed(`{"version":1,"op":"load","op":"status"}`), nil, "message_malformed"},
		{"other spelling", framed(`{"Version":1,"OP":"status"}`), nil, "message_malformed"},
		{"bytes after the end", framed(status + " {}"), nil, "message_malformed"},
		{"not JSON", framed("\x00\x01"), nil, "message_malformed"},
		{"deep JSON", framed(strings.Repeat("[", 60000)), nil, "message_malformed"},
		{"unknown request", framed(`{"version":1,"op":"force"}`), nil, "unknown_request"},
		{"version of the future", framed(`{"version":2,"op":"status"}`), nil, "message_version"},
		{"sequence missing", framed(`{"version":1,"op":"confirm"}`), nil, "bad_request"},
		{"sequence where none belongs", framed(`{"version":1,"op":"disable","sequence":3}`), nil, "bad_request"},
		{"sequence too large", framed(`{"version":1,"op":"cancel","sequence":4294967296}`), nil, "message_malformed"},
	} {
		t.Run("L/"+tc.name, func(t *testing.T) {
			before := openFiles(t)
			t.Cleanup(func() {
				if after := openFiles(t); after != before {
					t.Errorf("%d descriptors open, before %d", after, before)
				}
			})
			path := serve(t, func(r loaderapi.Request, _ []*os.File) (loaderapi.Answer, error) {
				t.Errorf("request %v came through", r)
				return loaderapi.Answer{}, nil
			})
			a := raw(t, path, tc.msg, tc.fds...)
			if a.Fault == nil || a.Fault.Code != tc.code {
				t.Errorf("got fault %+v, want code %q", a.Fault, tc.code)
			}
		})
	}
}

func slicesRepeat(n, times int) []int {
	s := make([]int, times)
	for i := range s {
		s[i] = n
	}
	return s
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"op":"load"}`), 2)
	f.Add([]byte(`{"version":1,"op":"confirm","sequence":3}`), 0)
	f.Add([]byte(`{"version":1,"op":"status"} `), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		r, err := loaderapi.ParseRequest(b, files)
		if err == nil && (r.Op == loaderapi.OpLoad) != (files == 2) {
			t.Errorf("%q with %d files came through", b, files)
		}
	})
}
