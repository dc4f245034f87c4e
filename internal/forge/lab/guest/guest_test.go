// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
)

// The agent runs in this process, on the other end of a pipe.
func startAgent(t *testing.T) (*Client, net.Conn) {
	t.Helper()
	inside, outside := net.Pipe()
	go func() { _ = Serve(inside) }()
	c := NewClient(outside)
	t.Cleanup(func() { _ = c.Close(); _ = inside.Close() })
	return c, inside
}

func TestAgentAnswers(t *testing.T) {
	c, _ := startAgent(t)
	hello, err := c.Await(t.Context(), "")
	if err != nil || hello.BootID == "" || hello.Release == "" {
		t.Fatalf("hello %+v, %v", hello, err)
	}
	res, err := c.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c", "cat; echo err >&2; exit 7"}, Stdin: []byte("in")})
	if err != nil || res.Exit != 7 || string(res.Stdout) != "in" || string(res.Stderr) != "err\n" {
		t.Errorf("got %+v, %v", res, err)
	}
	if _, err := c.Run(t.Context(), lab.Command{}); err == nil {
		t.Error("empty command was taken")
	}
	if _, err := c.call(t.Context(), request{Op: "dance"}, time.Minute); err == nil || !strings.Contains(err.Error(), "dance") {
		t.Errorf("unknown operation: %v", err)
	}
}

func TestPutIsWholeOrNotThere(t *testing.T) {
	c, _ := startAgent(t)
	path := filepath.Join(t.TempDir(), "f")
	content := bytes.Repeat([]byte{0, 0xff, '\n'}, 30_000) // three chunks
	if err := c.Put(t.Context(), path, 0o640, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	st, serr := os.Stat(path)
	if err != nil || serr != nil || !bytes.Equal(got, content) || st.Mode() != 0o640 {
		t.Errorf("%d bytes, mode %v, %v, %v", len(got), st.Mode(), err, serr)
	}
	other := filepath.Join(t.TempDir(), "g")
	_, err = c.call(t.Context(), request{Op: opPut, Path: other, Data: []byte("x"), Last: true, Mode: 0o600, SHA256: "00"}, time.Minute)
	if _, serr := os.Stat(other); err == nil || serr == nil {
		t.Errorf("damaged content got its name: %v, %v", err, serr)
	}
}

func TestARestartFailsWhoWaits(t *testing.T) {
	for name, tt := range map[string]struct {
		second Hello
		want   error
	}{
		"another boot":             {Hello{Protocol: protocol, BootID: "b2", Start: "s2"}, lab.ErrGuestRebooted},
		"same boot, another agent": {Hello{Protocol: protocol, BootID: "b1", Start: "s2"}, errAgentRestarted},
	} {
		t.Run(name, func(t *testing.T) {
			inside, outside := net.Pipe()
			defer inside.Close()
			c := NewClient(outside)
			defer c.Close()
			go func() {
				_ = writeLine(inside, response{Hello: &Hello{Protocol: protocol, BootID: "b1", Start: "s1"}})
				_, _ = bufio.NewReader(inside).ReadString('\n') // the request
				_ = writeLine(inside, response{Hello: &tt.second})
				_, _ = io.Copy(io.Discard, inside)
			}()
			if _, err := c.Await(t.Context(), ""); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Run(t.Context(), lab.Command{Argv: []string{"sleep", "60"}}); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if h := c.Hello(); h != tt.second {
				t.Errorf("hello %+v", h)
			}
		})
	}
}

func TestACutLineFailsWhoWaits(t *testing.T) {
	inside, outside := net.Pipe()
	c := NewClient(outside)
	time.AfterFunc(50*time.Millisecond, func() { _ = inside.Close() })
	if _, err := c.Await(t.Context(), ""); !errors.Is(err, ErrLineClosed) {
		t.Errorf("await: %v", err)
	}
	if _, err := c.Run(t.Context(), lab.Command{Argv: []string{"true"}}); !errors.Is(err, ErrLineClosed) {
		t.Errorf("run: %v", err)
	}
}

func TestADeafGuestDoesNotHoldTheCaller(t *testing.T) {
	inside, outside := net.Pipe() // nobody reads
	defer inside.Close()
	c := NewClient(outside)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Run(ctx, lab.Command{Argv: []string{"true"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// A slow line is no deaf guest: what is coming is waited for.
func TestAnAnswerThatIsComingIsWaitedFor(t *testing.T) {
	inside, outside := net.Pipe()
	defer inside.Close()
	c := NewClient(outside)
	defer c.Close()
	large := bytes.Repeat([]byte("x"), 60<<10)
	go func() {
		_ = writeLine(inside, response{Hello: &Hello{Protocol: protocol, BootID: "b", Start: "s"}})
		r := bufio.NewReader(inside)
		for n := range 2 {
			var req request
			if err := readLine(r, maxRequest, &req); err != nil {
				return
			}
			var line bytes.Buffer
			_ = writeLine(&line, response{ID: req.ID, Stdout: large})
			if n == 1 { // begins, and stops
				time.Sleep(time.Second)
			}
			for b := range slices.Chunk(line.Bytes(), 8<<10) {
				_, _ = inside.Write(b)
				time.Sleep(20 * time.Millisecond)
			}
		}
	}()
	const limit = 100 * time.Millisecond // less than the whole takes
	if res, err := c.call(t.Context(), request{Op: opRun}, limit); err != nil || !bytes.Equal(res.Stdout, large) {
		t.Errorf("%d bytes, %v", len(res.Stdout), err)
	}
	c.coming.Store(0)
	if _, err := c.call(t.Context(), request{Op: opRun}, limit); err == nil || !strings.Contains(err.Error(), "did not answer") {
		t.Errorf("nothing is coming, and yet: %v", err)
	}
}

func TestNoiseIsSkipped(t *testing.T) {
	var line bytes.Buffer
	line.WriteString("[    1.0] a kernel message in between\n\xff\xfe\n")
	line.WriteString(`00000000 {"id":"wrong sum"}` + "\n")
	line.WriteString(strings.Repeat("x", 200<<10) + "\n")
	if err := writeLine(&line, request{ID: "7", Op: opPing}); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(&line)
	for noise := 0; ; noise++ {
		var req request
		err := readLine(r, maxRequest, &req)
		if errors.Is(err, errNoise) {
			continue
		}
		if err != nil || req.ID != "7" || noise != 4 {
			t.Errorf("after %d lines of noise: %+v, %v", noise, req, err)
		}
		return
	}
}

func TestRequestsFitIntoTheLine(t *testing.T) {
	var line bytes.Buffer
	req := request{ID: "1000000", Op: opPut, Path: strings.Repeat("p", 200), Data: make([]byte, maxChunk),
		Last: true, SHA256: strings.Repeat("0", 64)}
	if err := writeLine(&line, req); err != nil || line.Len() > maxRequest {
		t.Errorf("%d bytes, at most %d, %v", line.Len(), maxRequest, err)
	}
}

func TestTheAgentsLineIsReadAsWritten(t *testing.T) {
	for arg, want := range map[string]string{"/dev/ttyS0": "/dev/ttyS0 115200", "/dev/ttyAMA0,57600": "/dev/ttyAMA0 57600",
		"ttyS0": "", "/dev/ttyS0,": "", "/dev/ttyS0,fast": "", "/dev/ttyS0,9600x": ""} {
		name, speed, err := parseTerminal(arg)
		if got := fmt.Sprint(name, " ", speed); (err != nil) != (want == "") || err == nil && got != want {
			t.Errorf("%q: %s, %v", arg, got, err)
		}
	}
	if err := CheckSpeed(115201); err == nil {
		t.Error("a speed that no line has")
	}
}

func TestTheAgentsOwnNameRunsTheAgentsProgram(t *testing.T) {
	c, _ := startAgent(t)
	res, err := c.Run(t.Context(), lab.Command{Argv: []string{AgentName, "-test.run=^$", "-test.v"}})
	if err != nil || res.Exit != 0 || !strings.Contains(string(res.Stdout), "PASS") {
		t.Errorf("got %+v, %v", res, err)
	}
}

func TestThisProcessIsNoGuest(t *testing.T) {
	if IsInit() {
		t.Error("a test program takes itself for a guest")
	}
}

func FuzzReadLine(f *testing.F) {
	f.Add([]byte("12345678 {}\n"))
	f.Add([]byte("\n\n {}"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bufio.NewReaderSize(bytes.NewReader(in), 16)
		for {
			var req request
			if err := readLine(r, 64, &req); err != nil && !errors.Is(err, errNoise) {
				return
			}
		}
	})
}
