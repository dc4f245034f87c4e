// SPDX-License-Identifier: Apache-2.0

// Command klatch-hostile does in a guest what a machine must withstand: it
// speaks to the loader past klatchd, asks klatchd for what it may not, and
// kills either of them at a chosen moment.
//
//	klatch-hostile load MANIFEST MODULE   give two files to the loader
//	klatch-hostile blockers MANIFEST MODULE
//	                   the same, and ask at once who blocks the transition
//	klatch-hostile insmod MODULE NAME     past the loader; says how many
//	                   nanoseconds the load and the transition took
//	klatch-hostile errno MODULE           past the loader; says what the kernel
//	                   answers, as a number
//	klatch-hostile kexec KERNEL INITRD LINE
//	                   start another kernel from this one, without firmware
//	klatch-hostile status                 ask the loader for its status
//	klatch-hostile disable                ask the loader for the break-glass
//	klatch-hostile api METHOD PATH        ask klatchd
//	klatch-hostile kill-at FILE WORD UNIT
//	                   watch a journal; as soon as it holds WORD, SIGKILL the
//	                   processes of a systemd service; says "killed"
//	klatch-hostile kill-often UNIT SEED LEAST MOST TIMES
//	                   SIGKILL them that many times, after delays in
//	                   milliseconds that follow from the seed
//	klatch-hostile socket PATH PROGRAM ARG...
//	                   listen as systemd does for a socket, run the program
//
// The answers of load, status, disable and api are JSON with kind, code and
// text.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/loaderclient"
	"klatch/internal/machine/local"
	"klatch/internal/wire"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "klatch-hostile:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx := context.Background()
	client := loaderclient.Dial(loaderapi.SocketPath)
	if len(args) == 0 {
		return errors.New("want a word")
	}
	switch word, args := args[0], args[1:]; {
	case word == "load" && len(args) == 2:
		return load(ctx, client, args[0], args[1], false)
	case word == "blockers" && len(args) == 2:
		return load(ctx, client, args[0], args[1], true)
	case word == "insmod" && len(args) == 2:
		return insmod(args[0], args[1])
	case word == "errno" && len(args) == 1:
		return errno(args[0])
	case word == "kexec" && len(args) == 3:
		return kexec(args[0], args[1], args[2])
	case word == "status" && len(args) == 0:
		st, err := client.Status(ctx)
		return tell(st, err)
	case word == "disable" && len(args) == 0:
		st, err := client.Disable(ctx)
		return tell(st, err)
	case word == "api" && len(args) == 2:
		return api(ctx, args[0], args[1])
	case word == "kill-at" && len(args) == 3:
		return killAt(args[0], args[1], args[2])
	case word == "kill-often" && len(args) == 5:
		return killOften(args[0], args[1:])
	case word == "socket" && len(args) >= 2:
		return socket(args[0], args[1:])
	}
	return fmt.Errorf("%q is not one of my tricks", args)
}

// answer is what every question ends with; the code is empty where it was
// done.
type answer struct {
	Kind   fault.Kind       `json:"kind"`
	Code   fault.Code       `json:"code"`
	Text   string           `json:"text"`
	Status loaderapi.Status `json:"status"`
	Stacks int              `json:"stacks"` // blocking tasks of others whose stack is known
}

func tell(st loaderapi.Status, err error, tasks ...loaderapi.Blocker) error {
	a := answer{Kind: fault.KindOf(err), Code: fault.CodeOf(err), Status: st}
	for _, t := range tasks {
		if len(t.Stack) > 0 && !strings.Contains(t.Stat, "(klatch-loader)") {
			a.Stacks++
		}
	}
	if err != nil {
		a.Text = err.Error()
	}
	return json.NewEncoder(os.Stdout).Encode(a)
}

func load(ctx context.Context, client *loaderclient.Client, manifest, module string, blockers bool) error {
	m, err := os.Open(manifest)
	if err != nil {
		return err
	}
	defer m.Close() //nolint:errcheck // opened for reading only
	k, err := os.Open(module)
	if err != nil {
		return err
	}
	defer k.Close() //nolint:errcheck // opened for reading only
	st, err := client.Load(ctx, m, k)
	if err == nil && blockers {
		var tasks []loaderapi.Blocker
		tasks, err = client.Blockers(ctx)
		if err == nil {
			st, err = client.Status(ctx) // tells whether the transition still ran
		}
		return tell(st, err, tasks...)
	}
	return tell(st, err)
}

// insmod loads a module itself and watches its transition.
func insmod(module, name string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	began := time.Now()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
		return err
	}
	loaded := time.Now()
	for {
		b, err := durable.ReadFile("/sys/kernel/livepatch/"+name+"/transition", 16)
		if err != nil {
			return err
		}
		if string(b) == "0\n" {
			_, err := fmt.Fprintln(os.Stdout, loaded.Sub(began).Nanoseconds(), time.Since(loaded).Nanoseconds())
			return err
		}
		<-time.After(time.Millisecond)
	}
}

// api asks klatchd without its client, which might be too polite.
func api(ctx context.Context, method, path string) error {
	c := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", local.SocketPath)
		}}}
	body := []byte(`{"server":"https://127.0.0.1:1","token":"klatch1.a.b"}`)
	q, err := http.NewRequestWithContext(ctx, method, "http://klatchd"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	a, err := c.Do(q)
	if err != nil {
		return err
	}
	defer a.Body.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(a.Body, 1<<20))
	if err != nil {
		return err
	}
	if a.StatusCode < 400 {
		return tell(loaderapi.Status{}, nil)
	}
	var p wire.Problem
	if err := json.Unmarshal(b, &p); err != nil {
		return err
	}
	return tell(loaderapi.Status{}, fault.New(p.Type, p.Code, "%s", p.Title))
}

// killAt waits for renames in the journal's folder, so that it is there before
// the process has done anything after the write.
func killAt(file, word, unit string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(file), unix.IN_MOVED_TO); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(os.Stdout, "watching"); err != nil {
		return err
	}
	for events := make([]byte, 4096); ; {
		b, err := durable.ReadFile(file, 16<<20)
		if err == nil && bytes.Contains(b, []byte(word)) {
			n, err := kill(unit)
			if err == nil && n == 0 {
				err = fmt.Errorf("%s holds %q, and %s does not run", file, word, unit)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(os.Stdout, "killed")
			return err
		}
		if _, err := unix.Read(fd, events); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// kill ends the processes of a service and says how many there were.
func kill(unit string) (n int, err error) {
	b, err := durable.ReadFile("/sys/fs/cgroup/system.slice/"+unit+"/cgroup.procs", 1<<16)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for pid := range strings.FieldsSeq(string(b)) {
		p, err := strconv.Atoi(pid)
		if err != nil {
			return n, err
		}
		if err := unix.Kill(p, unix.SIGKILL); err == nil {
			n++
		}
	}
	return n, nil
}

func killOften(unit string, numbers []string) error {
	var v [4]int
	for i, s := range numbers {
		var err error
		if v[i], err = strconv.Atoi(s); err != nil {
			return err
		}
	}
	random := rand.New(rand.NewPCG(uint64(v[0]), 0))
	for killed := 0; killed < v[3]; {
		<-time.After(time.Duration(v[1]+random.IntN(v[2]-v[1]+1)) * time.Millisecond)
		n, err := kill(unit)
		if err != nil {
			return err
		}
		killed += min(n, 1)
	}
	_, err := fmt.Fprintln(os.Stdout, "killed")
	return err
}

// socket hands a listening socket over as sd_listen_fds(3) says.
func socket(path string, argv []string) error {
	_ = os.Remove(path)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 8); err != nil {
		return err
	}
	if err := unix.Dup3(fd, 3, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is 3 already
		return err
	}
	if _, err := unix.FcntlInt(3, unix.F_SETFD, 0); err != nil {
		return err
	}
	env := append(os.Environ(), "LISTEN_FDS=1", "LISTEN_PID="+strconv.Itoa(os.Getpid()))
	return unix.Exec(argv[0], argv, env)
}
