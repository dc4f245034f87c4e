// SPDX-License-Identifier: Apache-2.0

// Command klatch-loader is the root side of a machine. Its socket starts it;
// it verifies a livepatch again, loads it and ends when nobody asks. It links
// no network and starts no program; deps_test.go and depaware.txt guard that.
package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/machine/klp"
	"klatch/internal/machine/loader"
	"klatch/internal/machine/loaderapi"
)

var version = "unknown" // set when linking

const usage = `usage: klatch-loader serve | boot | clear-breaker | version

  serve          answer requests on the socket that systemd hands over
  boot           put the confirmed livepatch of this kernel build back
  clear-breaker  load at boot again, although the machine died with the
                 livepatch twice
`

// idle is how long root stays resident when nobody asks.
const idle = 30 * time.Second

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) != 1 {
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	l := &loader.Loader{
		Kernel: klp.Running(),
		State:  "/var/lib/klatch-loader",
		Etc:    "/etc/klatch",
		Log:    log,
		Overdue: func() {
			log.Error("request passed its time limit, the loader ends")
			os.Exit(75)
		},
	}
	var err error
	switch args[0] {
	case "serve":
		err = serve(l)
	case "boot":
		var outcome string
		outcome, err = l.Boot()
		_, _ = fmt.Fprintf(stdout, "%s\n", outcome)
	case "clear-breaker":
		err = l.ClearBreaker()
	case "version":
		_, _ = fmt.Fprintf(stdout, "klatch-loader %s\n", version)
	default:
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "klatch-loader: cannot %s: %v\n", args[0], err)
		if hint := fault.HintOf(err); hint != "" {
			_, _ = fmt.Fprintf(stderr, "hint: %s\n", hint)
		}
	}
	return fault.ExitStatus(err)
}

func serve(l *loader.Loader) error {
	passwd, err := durable.ReadFile("/etc/passwd", 1<<20)
	if err != nil {
		return err
	}
	l.Daemon = uidOf("klatch", string(passwd))
	// The one socket that systemd opened (sd_listen_fds(3)).
	const first = 3
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || os.Getenv("LISTEN_FDS") != "1" {
		return errors.New("systemd handed over no socket: start klatch-loader.socket")
	}
	on, err := loaderapi.On(first)
	if err != nil {
		return err
	}
	return l.Serve(on, idle)
}

// uidOf finds a user in /etc/passwd (passwd(5)). Without it only root may ask.
// Package os/user would do the same with more code linked.
func uidOf(name, passwd string) uint32 {
	for line := range strings.Lines(passwd) {
		f := strings.Split(line, ":")
		if len(f) < 4 || f[0] != name {
			continue
		}
		if n, err := strconv.ParseUint(f[2], 10, 32); err == nil {
			return uint32(n)
		}
	}
	return 0
}
