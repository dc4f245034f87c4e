// SPDX-License-Identifier: Apache-2.0

package facts

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// Marks is how much the kernel has complained since it booted. Two marks of
// one boot tell whether it complained in between. The counters and the taint
// word are readable by everybody, so klatchd needs no privilege for this; the
// kernel log is only there to name the complaint.
type Marks struct {
	BootID string  `json:"boot_id"`
	Oops   *uint64 `json:"oops,omitempty"`  // /sys/kernel/oops_count; nil on kernels without it
	Warns  *uint64 `json:"warns,omitempty"` // /sys/kernel/warn_count; nil on kernels without it
	Taint  *uint64 `json:"taint,omitempty"` // /proc/sys/kernel/tainted
	Log    *uint64 `json:"log,omitempty"`   // newest record of the kernel log; nil where it is not readable
}

// The taint bits that mean trouble (Documentation/admin-guide/tainted-kernels.rst).
const (
	taintMachineCheck = 1 << 4
	taintBadPage      = 1 << 5
	taintDied         = 1 << 7
	taintWarn         = 1 << 9
	taintSoftLockup   = 1 << 14

	taintTrouble = taintMachineCheck | taintBadPage | taintDied | taintWarn | taintSoftLockup
)

// Marks takes the marks of now.
func (m Machine) Marks() Marks {
	boot, err := m.BootID()
	if err != nil {
		boot = ""
	}
	mk := Marks{
		BootID: boot,
		Oops:   m.number("sys/kernel/oops_count"),
		Warns:  m.number("sys/kernel/warn_count"),
		Taint:  m.number("proc/sys/kernel/tainted"),
	}
	if recs, err := m.kernelLog(0); err == nil && len(recs) > 0 {
		mk.Log = &recs[len(recs)-1].seq
	}
	return mk
}

// Verdict says what happened between two marks.
type Verdict string

// The verdicts.
const (
	Quiet   Verdict = "quiet"   // certainly nothing new
	Trouble Verdict = "trouble" // an oops, a warning or worse
	Unclear Verdict = "unclear" // this kernel or these rights do not let us know
)

// Since compares now with earlier marks. Text describes trouble, or what is
// missing to be sure.
func (m Machine) Since(before Marks) (Verdict, string) {
	now := m.Marks()
	if before.BootID == "" || before.BootID != now.BootID {
		return Unclear, "the marks are of another boot"
	}
	grew := func(a, b *uint64) bool { return a != nil && b != nil && *b > *a }
	var what []string
	if grew(before.Oops, now.Oops) {
		what = append(what, "kernel oops")
	}
	if grew(before.Warns, now.Warns) {
		what = append(what, "kernel warning")
	}
	if before.Taint != nil && now.Taint != nil {
		if bits := *now.Taint &^ *before.Taint & taintTrouble; bits != 0 && len(what) == 0 {
			what = append(what, fmt.Sprintf("kernel taint bits %#x", bits))
		}
	}
	var line string
	logRead := false
	if before.Log != nil {
		if recs, err := m.kernelLog(*before.Log + 1); err == nil {
			logRead = true
			for _, r := range recs {
				if IsTrouble(r.text) {
					line = r.text
					break
				}
			}
		}
	}
	switch {
	case len(what) > 0 && line != "":
		return Trouble, strings.Join(what, ", ") + ": " + line
	case len(what) > 0:
		return Trouble, strings.Join(what, ", ")
	case line != "":
		return Trouble, line
	}
	counted := before.Oops != nil && before.Warns != nil && now.Oops != nil && now.Warns != nil
	// Without counters a taint bit that was clear and still is says the same.
	clean := now.Taint != nil && *now.Taint&(taintWarn|taintDied) == 0
	if counted || clean || logRead {
		return Quiet, ""
	}
	return Unclear, "this kernel has no warning counter, is tainted by an earlier warning, and its log is not readable"
}

func (m Machine) number(rel string) *uint64 {
	b, err := m.read(rel)
	if err != nil {
		return nil
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return nil
	}
	return &n
}

// troubleLine holds the first lines of kernel complaints. "Call Trace" and
// registers follow one of these and are no complaint of their own.
var troubleLine = regexp.MustCompile(`^(BUG: |kernel BUG at |WARNING: |Oops: |general protection fault|` +
	`Unable to handle kernel |unregister_netdevice: waiting|Kernel panic|Internal error: |` +
	`INFO: rcu_\S+ (self-)?detected|rcu: INFO: \S+ (self-)?detected|INFO: task .* blocked for more than|` +
	`watchdog: BUG: |list_(add|del) corruption|stack segment: |invalid opcode: |divide error: )`)

// IsTrouble says whether a line of the kernel log begins a complaint.
func IsTrouble(line string) bool { return troubleLine.MatchString(line) }

type logRecord struct {
	seq  uint64
	text string
}

// maxLogRecords limits one reading; the kernel's ring holds far fewer.
const maxLogRecords = 100_000

// kernelLog reads the records from seq on. /dev/kmsg gives one record a read
// and EAGAIN at the end (Documentation/ABI/testing/dev-kmsg).
func (m Machine) kernelLog(from uint64) ([]logRecord, error) {
	fd, err := syscall.Open(m.path("dev/kmsg"), syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd) //nolint:errcheck // opened for reading only
	var recs []logRecord
	buf := make([]byte, 8192) // CONSOLE_EXT_LOG_MAX
	var rest []byte
	for len(recs) < maxLogRecords {
		n, err := syscall.Read(fd, buf)
		switch {
		case errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.EINTR):
			continue // records were overwritten; go on with the oldest left
		case errors.Is(err, syscall.EAGAIN), err == nil && n <= 0:
			return recs, nil
		case err != nil:
			return recs, err
		}
		// A captured log is a plain file: several records a read.
		rest = append(rest, buf[:n]...)
		for {
			line, after, ok := bytes.Cut(rest, []byte("\n"))
			if !ok {
				break
			}
			if r, ok := parseRecord(string(line)); ok && r.seq >= from {
				recs = append(recs, r)
			}
			rest = after
		}
	}
	return recs, nil
}

// parseRecord reads "priority,sequence,microseconds,flags[,…];text". Lines
// that begin with a space continue a record with key=value pairs. Only what
// the kernel itself wrote counts: programs may write to /dev/kmsg too, and
// their facility is not 0.
func parseRecord(line string) (logRecord, bool) {
	head, text, ok := strings.Cut(line, ";")
	if !ok || strings.HasPrefix(line, " ") {
		return logRecord{}, false
	}
	fields := strings.Split(head, ",")
	if len(fields) < 4 {
		return logRecord{}, false
	}
	prio, err1 := strconv.ParseUint(fields[0], 10, 16)
	seq, err2 := strconv.ParseUint(fields[1], 10, 64)
	if err1 != nil || err2 != nil || prio>>3 != 0 {
		return logRecord{}, false
	}
	return logRecord{seq, text}, true
}
