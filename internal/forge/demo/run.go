// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"klatch/internal/livepatch"
	"klatch/internal/wire"
)

// shown and quietly say whether a command and its output are part of the story.
const (
	shown   = true
	quietly = false
)

// forge runs the publisher's tool.
func (d *Demo) forge(ctx context.Context, args ...string) error {
	return d.command(ctx, shown, d.program("klatch-forge"), append([]string{"--cache", d.Cache}, args...)...)
}

// command runs a program of the host and shows it as a person would type it.
func (d *Demo) command(ctx context.Context, show bool, program string, args ...string) error {
	if show {
		d.print("   $ %s\n", d.typed(program, args))
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = d.Source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	var last bytes.Buffer
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		sc := bufio.NewScanner(r)
		sc.Buffer(nil, 1<<20)
		for sc.Scan() {
			if show {
				d.print("     %s\n", sc.Text())
			} else {
				fmt.Fprintln(&last, sc.Text())
			}
		}
		_, _ = io.Copy(io.Discard, r)
	}()
	err := cmd.Run()
	_ = w.Close()
	<-finished
	if err != nil {
		return fmt.Errorf("%s: %w: %s", d.typed(program, args), err, strings.TrimSpace(last.String()))
	}
	return nil
}

// typed shortens paths that only this run has.
func (d *Demo) typed(program string, args []string) string {
	words := []string{filepath.Base(program)}
	for i := 0; i < len(args); i++ {
		if args[i] == "--cache" {
			i++
			continue
		}
		words = append(words, strings.ReplaceAll(args[i], d.Work+"/", ""))
	}
	return strings.Join(words, " ")
}

// server is a running klatch-server.
type server struct {
	cmd          *exec.Cmd
	log          *os.File
	fleet, admin string
	port         string
}

var readyLine = regexp.MustCompile(`ready fleet=https://(\S+):([0-9]+) admin=(\S+)`)

// startServer starts a server on free ports and waits for its ready line.
func startServer(ctx context.Context, program, dir, logFile string) (*server, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, "--data", dir, "serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0") //nolint:noctx // ends by stop
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the story, which then stops it
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	s := &server{cmd: cmd, log: log}
	lines := make(chan []string, 1)
	go func() {
		sc := bufio.NewScanner(stdout)
		for sc.Scan() {
			if m := readyLine.FindStringSubmatch(sc.Text()); m != nil {
				lines <- m
			}
		}
		close(lines)
	}()
	select {
	case m := <-lines:
		if m == nil {
			return nil, errors.Join(fmt.Errorf("klatch-server ended before it was ready, see %s", logFile), s.stop())
		}
		s.fleet, s.port, s.admin = "https://"+m[1]+":"+m[2], m[2], m[3]
		return s, nil
	case <-time.After(30 * time.Second):
		return nil, errors.Join(errors.New("klatch-server was not ready within 30 s"), s.stop())
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), s.stop())
	}
}

func (s *server) stop() error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(10*time.Second, func() { _ = s.cmd.Process.Kill() })
	defer timer.Stop()
	err := s.cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && !exit.Exited() {
		err = nil // our own signal
	}
	return errors.Join(err, s.log.Close())
}

// row is one machine as the admin API tells it; other members are not needed.
type row struct {
	MachineID string     `json:"machine_id"`
	Facts     wire.Facts `json:"facts"`
	State     wire.State `json:"state"`
}

// machine waits until the server has the one machine with a livepatch that is
// loaded again and confirmed, and returns what it says.
func (s *server) machine(ctx context.Context, tokenFile string, phase wire.Phase, seq livepatch.Sequence) (row, error) {
	token, err := os.ReadFile(tokenFile)
	if err != nil {
		return row{}, err
	}
	var last row
	deadline := time.Now().Add(2 * time.Minute)
	for time.Now().Before(deadline) {
		rows, err := s.machines(ctx, strings.TrimSpace(string(token)))
		if err != nil {
			return row{}, err
		}
		if len(rows) == 1 {
			last = rows[0]
			settled := last.State.Phase == phase || last.State.Phase == wire.Idle
			if settled && last.State.Sequence == seq && last.State.Highest >= seq {
				return last, nil
			}
		}
		select {
		case <-ctx.Done():
			return row{}, ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
	return last, fmt.Errorf("the server does not show sequence %d as confirmed: %+v", seq, last.State)
}

func (s *server) machines(ctx context.Context, token string) ([]row, error) {
	var list struct {
		Machines []row `json:"machines"`
	}
	return list.Machines, s.get(ctx, token, "/api/v1/machines", &list)
}

// get reads one answer of the admin API.
func (s *server) get(ctx context.Context, token, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.admin+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	client := &http.Client{Timeout: 10 * time.Second}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close() //nolint:errcheck // read only
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, res.Status)
	}
	return json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(into)
}
