// SPDX-License-Identifier: Apache-2.0

// Package guest is both ends of the line into a lab machine: the agent that
// runs inside (as init of the small guest, or as a service of a full one),
// and the Client that the drivers use outside.
//
// The line is a serial port, because every kernel has a driver for it built
// in and it needs no network. Start with Main for the inside and with Client
// for the outside. The agent obeys whoever holds the line, as root: it must
// never run on a machine that is not a lab guest.
package guest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
	"strings"
)

// A message is one line: eight hexadecimal digits (CRC-32, IEEE, of the
// rest), a space, one JSON object, a newline. The sum is there because a
// serial line drops bytes without telling: a damaged base64 text may still
// be valid. A line whose sum is wrong is thrown away by both ends, and the
// one who waits runs into its time limit.

// Operations of a request.
const (
	opPing   = "ping"   // answer with a hello
	opRun    = "run"    // run a program
	opPut    = "put"    // write a piece of a file
	opReboot = "reboot" // answer, then restart the machine in an orderly way
)

// request goes from the client to the agent.
type request struct {
	ID string `json:"id"`
	Op string `json:"op"`

	Argv      []string `json:"argv,omitempty"`
	Env       []string `json:"env,omitempty"`
	Stdin     []byte   `json:"stdin,omitempty"`      // base64; small inputs
	StdinFile string   `json:"stdin_file,omitempty"` // put before, removed after; large inputs
	TimeoutMS int64    `json:"timeout_ms,omitempty"`
	MaxOutput int      `json:"max_output,omitempty"` // bytes, for stdout and stderr each

	Path   string `json:"path,omitempty"`
	Offset int64  `json:"offset,omitempty"`
	Data   []byte `json:"data,omitempty"` // base64
	Last   bool   `json:"last,omitempty"`
	Mode   uint32 `json:"mode,omitempty"`
	SHA256 string `json:"sha256,omitempty"` // of the whole file, with Last
}

// response answers the request with the same id. A response without an id is
// the hello that an agent says when it starts.
type response struct {
	ID        string `json:"id,omitempty"`
	Error     string `json:"error,omitempty"` // the agent could not do it
	Exit      int    `json:"exit"`
	Stdout    []byte `json:"stdout,omitempty"`
	Stderr    []byte `json:"stderr,omitempty"`
	Truncated bool   `json:"truncated,omitempty"`
	TimedOut  bool   `json:"timed_out,omitempty"`
	TookMS    int64  `json:"took_ms,omitempty"`
	Hello     *Hello `json:"hello,omitempty"`
}

// Hello is what an agent says about itself.
type Hello struct {
	Protocol int    `json:"protocol"`
	BootID   string `json:"boot_id"`
	Release  string `json:"release"` // uname -r
	Start    string `json:"start"`   // random, new for every start of the agent
}

const (
	// protocol is the version of the messages.
	protocol = 1
	// maxRequest bounds a line towards the agent. The kernel's terminal
	// layer keeps 64 KiB for a reader that is late and drops what comes
	// after, so a request must be shorter and the next one must wait.
	maxRequest = 48 << 10
	// maxChunk of a file fits into maxRequest as base64.
	maxChunk = 32 << 10
	// maxResponse bounds a line towards the client: stdout and stderr at
	// their largest as base64.
	maxResponse = 32 << 20
	// maxOutput is the largest limit a request may ask for.
	maxOutput = 8 << 20
)

// writeLine sends one message in a single Write.
func writeLine(w io.Writer, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	line := fmt.Appendf(nil, "%08x %s\n", crc32.ChecksumIEEE(body), body)
	_, err = w.Write(line)
	return err
}

// errNoise marks a line that is not a message.
var errNoise = errors.New("noise on the line")

// readLine reads the next line, at most limit bytes of it, and decodes it
// into v. errNoise means: go on with the next line.
func readLine(r *bufio.Reader, limit int, v any) error {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) <= limit {
			line = append(line, part...)
		} else {
			line = append(line[:0], '!') // too long: noise, but read on to its end
		}
		switch {
		case err == nil:
			return decodeLine(line, v)
		case !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
	}
}

func decodeLine(line []byte, v any) error {
	sum, body, ok := strings.Cut(strings.TrimRight(string(line), "\r\n"), " ")
	if !ok || len(sum) != 8 {
		return errNoise
	}
	want, err := strconv.ParseUint(sum, 16, 32)
	if err != nil || uint32(want) != crc32.ChecksumIEEE([]byte(body)) {
		return errNoise
	}
	if err := json.Unmarshal([]byte(body), v); err != nil {
		return errNoise
	}
	return nil
}
