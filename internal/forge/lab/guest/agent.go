// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Serve is the agent: it obeys the requests on the line until the line ends.
func Serve(line io.ReadWriter) error {
	a := &agent{line: line, hello: Hello{
		Protocol: protocol,
		BootID:   readTrimmed("/proc/sys/kernel/random/boot_id"),
		Release:  readTrimmed("/proc/sys/kernel/osrelease"),
		Start:    rand.Text(),
	}}
	if err := a.answer(response{Hello: &a.hello}); err != nil {
		return err
	}
	r := bufio.NewReaderSize(line, maxRequest)
	for {
		var req request
		switch err := readLine(r, maxRequest, &req); {
		case errors.Is(err, errNoise):
			continue
		case err != nil:
			return err
		}
		// Pieces of a file must stay in order; commands must not hold up
		// each other.
		if req.Op == opPut {
			a.serve(req)
		} else {
			go a.serve(req)
		}
	}
}

type agent struct {
	line    io.Writer
	writing sync.Mutex
	hello   Hello
}

func (a *agent) serve(req request) {
	var res response
	var err error
	switch req.Op {
	case opPing:
		res.Hello = &a.hello
	case opRun:
		res, err = run(req)
	case opPut:
		err = put(req)
	case opReboot:
		defer reboot()
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	res.ID = req.ID
	if err != nil {
		res.Error = err.Error()
	}
	if err := a.answer(res); err != nil {
		fmt.Fprintln(os.Stderr, "klatch lab agent: answer:", err)
	}
}

func (a *agent) answer(res response) error {
	a.writing.Lock()
	defer a.writing.Unlock()
	return writeLine(a.line, res)
}

func run(req request) (response, error) {
	if len(req.Argv) == 0 {
		return response{}, errors.New("run: empty argv")
	}
	stdin := req.Stdin
	if req.StdinFile != "" {
		var err error
		if stdin, err = os.ReadFile(req.StdinFile); err != nil {
			return response{}, err
		}
		defer os.Remove(req.StdinFile) //nolint:errcheck // a left-over in a guest that is thrown away
	}
	limit := req.MaxOutput
	if limit <= 0 || limit > maxOutput {
		limit = maxOutput
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(req.TimeoutMS)*time.Millisecond)
	defer cancel()

	stdout, stderr := &capture{left: limit}, &capture{left: limit}
	cmd := exec.CommandContext(ctx, req.Argv[0], req.Argv[1:]...)
	if req.Argv[0] == AgentName { // this program, wherever it lies
		cmd.Path, cmd.Err = "/proc/self/exe", nil
	}
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), req.Env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A child that went into the background keeps our pipes open; the
	// command itself has ended, so do not wait for it for long.
	cmd.WaitDelay = 2 * time.Second

	began := time.Now()
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	res := response{
		Exit:      cmd.ProcessState.ExitCode(),
		Stdout:    stdout.buf.Bytes(),
		Stderr:    stderr.buf.Bytes(),
		Truncated: stdout.cut || stderr.cut,
		TimedOut:  ctx.Err() != nil,
		TookMS:    time.Since(began).Milliseconds(),
	}
	if cmd.ProcessState == nil { // not started: as a shell would say it
		res.Exit = 127
		res.Stderr = []byte(err.Error() + "\n")
		return res, nil
	}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		res.Exit = 128 + int(ws.Signal())
	}
	return res, nil
}

// start starts a program that the kernel may kill when memory runs out,
// unlike the agent itself. The value is inherited, so it is lowered and
// raised around the start: the agent is a target for a moment.
var starting sync.Mutex

func start(cmd *exec.Cmd) error {
	starting.Lock()
	defer starting.Unlock()
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0o644) //nolint:forbidigo // no file of ours
	defer protectFromOOM()
	return cmd.Start()
}

// put writes one piece of a file beside its final name, and renames with the
// last piece.
func put(req request) error {
	part := req.Path + ".part"
	flags := os.O_WRONLY | os.O_CREATE
	if req.Offset == 0 {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(part, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(req.Data, req.Offset)
	if err := errors.Join(err, f.Close()); err != nil || !req.Last {
		return err
	}
	content, err := os.ReadFile(part)
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(content); hex.EncodeToString(sum[:]) != req.SHA256 {
		return fmt.Errorf("put %s: content was damaged on the line", req.Path)
	}
	if err := os.Chmod(part, os.FileMode(req.Mode)); err != nil {
		return err
	}
	return os.Rename(part, req.Path)
}

// rebootDelay is for the answer: on a line with frames it is under way still.
const rebootDelay = 300 * time.Millisecond

// reboot restarts the machine. Where a real init runs it must do the work.
func reboot() {
	<-time.After(rebootDelay)
	if _, err := os.Stat(Marker); err == nil {
		syscall.Sync()
		_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
		return
	}
	if out, err := exec.CommandContext(context.Background(), "systemctl", "--no-block", "reboot").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "klatch lab agent: reboot: %v: %s\n", err, out)
	}
}

// capture keeps the first bytes of an output and swallows the rest, so that
// the program does not block.
type capture struct {
	buf  bytes.Buffer
	left int
	cut  bool
}

func (c *capture) Write(p []byte) (int, error) {
	keep := p[:min(len(p), c.left)]
	c.buf.Write(keep)
	c.left -= len(keep)
	c.cut = c.cut || len(keep) < len(p)
	return len(p), nil
}
