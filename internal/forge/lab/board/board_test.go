// SPDX-License-Identifier: Apache-2.0

package board

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
)

const goodFile = `name = "rack3-b2"
[line]
serial = "/dev/ttyUSB0"
[power]
on = ["pdu", "on"]
off = ["pdu", "off"]
`

func TestBoardsFile(t *testing.T) {
	f, err := Parse([]byte(goodFile))
	if err != nil {
		t.Fatal(err)
	}
	if f.Line.Speed != 115200 || *f.Power.OffSeconds != 5 || f.Power.TimeoutSeconds != 60 || f.BootSeconds != 300 {
		t.Errorf("filled in: %+v, power off %d s", f, *f.Power.OffSeconds)
	}
	replace := func(old, with string) string { return strings.Replace(goodFile, old, with, 1) }
	for name, tt := range map[string]struct{ text, want string }{
		"not TOML":               {"name", ""},
		"no name":                {replace("rack3-b2", ""), "name"},
		"a name with a path":     {replace("rack3-b2", "../x"), "name"},
		"a word nobody knows":    {goodFile + "of_seconds = 3\n", "of_seconds"},
		"no line":                {replace(`serial = "/dev/ttyUSB0"`, ""), "one of serial"},
		"two lines":              {replace("[line]", "[line]\nsocket = \"/x\""), "one of serial"},
		"a relative terminal":    {replace("/dev/ttyUSB0", "ttyUSB0"), "absolute"},
		"a speed nobody has":     {replace("[power]", "speed = 115201\n[power]"), "115201"},
		"speed of a socket":      {replace(`serial = "/dev/ttyUSB0"`, "socket = \"/x\"\nspeed = 9600"), "speed"},
		"no power off":           {replace(`off = ["pdu", "off"]`, ""), "off"},
		"a power on without end": {goodFile + "timeout_seconds = 100000\n", "timeout_seconds"},
		"a long darkness":        {goodFile + "off_seconds = 9999\n", "off_seconds"},
		"a negative boot":        {"boot_seconds = -1\n" + goodFile, "boot_seconds"},
		"a restart of nothing":   {goodFile + "[kernel]\nrestart = \"self\"\n", "restart"},
		"an unknown restart":     {goodFile + "[kernel]\nchoose = [\"x\"]\nrestart = \"kick\"\n", "kick"},
		"a console without line": {goodFile + "[console]\nspeed = 9600\n", "console"},
		"a program with no name": {goodFile + "[kernel]\nchoose = [\"\"]\n", "no name"},
	} {
		if _, err := Parse([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q in it", name, err, tt.want)
		}
	}
	path := filepath.Join(t.TempDir(), "b.toml")
	if _, err := Load(path); err == nil {
		t.Error("a file that is not there was read")
	}
	if err := os.WriteFile(path, []byte(goodFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if f, err := Load(path); err != nil || f.Lock != path+".lock" {
		t.Errorf("lock %q, %v", f.Lock, err)
	}
	t.Chdir(filepath.Dir(filepath.Dir(path)))
	name := filepath.Join(filepath.Base(filepath.Dir(path)), "b.toml")
	if f, err := Load(name); err != nil || f.Lock != name+".lock" {
		t.Errorf("lock of a relative path %q, %v", f.Lock, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(goodFile))
	f.Add([]byte("[console]\nserial=\"/dev/x\"\n[kernel]\nchoose=[\"a\"]\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		b, err := Parse(in)
		if err == nil && (b.Name == "" || len(b.Power.Off) == 0 || b.Power.OffSeconds == nil || b.BootSeconds < 1) {
			t.Errorf("taken: %+v", b)
		}
	})
}

func TestALockSaysWhoHoldsItAndEndsWithItsHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "board.lock")
	if os.Getenv("KLATCH_TEST_LOCK") != "" {
		if _, err := lock(os.Getenv("KLATCH_TEST_LOCK")); err != nil {
			t.Fatal(err)
		}
		fmt.Println("locked") // for the test that started this process
		time.Sleep(time.Hour)
	}
	holder := exec.Command(os.Args[0], "-test.run=^TestALockSaysWho")
	holder.Env = append(os.Environ(), "KLATCH_TEST_LOCK="+path)
	out, err := holder.StdoutPipe()
	if err == nil {
		err = holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "locked\n" {
		t.Fatalf("holder says %q, %v", line, err)
	}
	rig, power := fakeRig(t, nil)
	rig.cfg.File.Lock = path
	_, err = rig.Boot(t.Context(), lab.Spec{Name: "x", Kernel: image(t, "6.1.0-1 (x@y) #1 SMP")})
	labtest.Broken(t, err)
	if !strings.Contains(err.Error(), fmt.Sprintf("process %d ", holder.Process.Pid)) {
		t.Errorf("does not say who: %v", err)
	}
	if b, err := os.ReadFile(power); err == nil {
		t.Errorf("the power of somebody else's board was switched: %s", b)
	}
	_ = holder.Process.Kill() // SIGKILL: it cannot clean up
	_ = holder.Wait()
	unlock, err := lock(path)
	if err != nil {
		t.Fatalf("a dead process holds the board: %v", err)
	}
	if err := unlock(); err != nil {
		t.Error(err)
	}
}

// image makes the header of a kernel with this version.
func image(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(path, header(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func header(text string) []byte {
	b := make([]byte, 0x300)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x100)
	return append(b, text+"\x00"...)
}

func TestTheImageSaysWhatMustRun(t *testing.T) {
	got, err := imageVersion(image(t, "6.1.0-50-cloud-amd64 (a@b) #1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-07-02)"))
	want := version{"6.1.0-50-cloud-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-07-02)"}
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for name, raw := range map[string][]byte{
		"empty": nil, "no header": make([]byte, 0x1000), "version outside": header("")[:0x210],
		"no release": header(" (x) #1"), "no builder": header("6.1 #1"), "no end": bytes.TrimRight(header("6.1 (x) #1"), "\x00"),
	} {
		if v, err := parseImage(raw); err == nil {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

func FuzzParseImage(f *testing.F) {
	f.Add(header("6.1 (x) #1"))
	f.Fuzz(func(t *testing.T, in []byte) {
		if v, err := parseImage(in); err == nil && (v.release == "" || !strings.HasPrefix(v.build, "#")) {
			t.Errorf("%+v", v)
		}
	})
}

func FuzzParseState(f *testing.F) {
	f.Add("6.1\n#1 SMP\nconsole=ttyS0\n2\n500000\n")
	f.Fuzz(func(t *testing.T, in string) {
		if s, err := parseState(in); err == nil && s.running.release == "" && s.running.build == "" && s.commandLine == "" {
			t.Logf("%+v", s)
		}
	})
}

func TestTheLastWordsOfTheCommandLineCount(t *testing.T) {
	s := state{commandLine: "quiet panic=1 a=1 b=2"}
	for words, want := range map[string]bool{"a=1 b=2": true, "b=2": true, "a=1": false, "=2": false, "quiet panic=1 a=1 b=2": true} {
		if got := s.endsWith(strings.Fields(words)); got != want {
			t.Errorf("%q: %v", words, got)
		}
	}
}

// fakeRig is a rig whose power commands write into a file, and whose line
// nobody answers.
func fakeRig(t *testing.T, change func(*File)) (*Rig, string) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "power.log")
	f, err := Parse(fmt.Appendf(nil, "name=\"fake\"\nlock=%q\nboot_seconds=1\n[line]\nsocket=%q\n[power]\non=[\"sh\",\"-c\",\"echo on $KLATCH_BOARD >> %s\"]\noff=[\"sh\",\"-c\",\"echo off >> %s\"]\noff_seconds=0\ntimeout_seconds=2\n",
		filepath.Join(dir, "lock"), filepath.Join(dir, "sock"), log, log))
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&f)
	}
	r, err := New(Config{File: f, Scratch: dir})
	if err != nil {
		t.Fatal(err)
	}
	return r, log
}

func TestABoardThatCannotBeUsedIsBroken(t *testing.T) {
	good := lab.Spec{Name: "x", Kernel: image(t, "6.1.0-1 (x@y) #1 SMP")}
	for name, tt := range map[string]struct {
		file  func(*File)
		spec  func(*lab.Spec)
		want  string
		power string // what was switched
	}{
		"power cannot be cut":        {func(f *File) { f.Power.Off = []string{"sh", "-c", "echo outlet 3 burnt >&2; exit 4"} }, nil, "outlet 3 burnt", ""},
		"power command does not end": {func(f *File) { f.Power.On = []string{"sleep", "60"} }, nil, "did not end within 2s", "off\noff\n"},
		"no such power command":      {func(f *File) { f.Power.On = []string{"/no/such/pdu"} }, nil, "/no/such/pdu", "off\noff\n"},
		"nobody answers":             {nil, nil, "line", "off\non fake\noff\n"},
		"no such kernel":             {nil, func(s *lab.Spec) { s.Kernel += "x" }, "no such file", ""},
		"not a kernel":               {nil, func(s *lab.Spec) { s.Kernel = os.Args[0] }, "not a bzImage", ""},
		"a disk of its own":          {nil, func(s *lab.Spec) { s.Root = s.Kernel }, "own disk", ""},
		"another firmware":           {nil, func(s *lab.Spec) { s.Firmware = &lab.Firmware{} }, "own firmware", ""},
		"another network":            {nil, func(s *lab.Spec) { s.Network = lab.HostOnly }, "network", ""},
		"words that nobody can say":  {nil, func(s *lab.Spec) { s.Append = []string{"a=1"} }, "{append}", ""},
		"a file outside":             {nil, func(s *lab.Spec) { s.Files = []lab.File{{Name: "../x"}} }, "relative path", ""},
		"a file for the shell":       {nil, func(s *lab.Spec) { s.Files = []lab.File{{Name: "$(reboot)"}} }, "plain", ""},
		"a file that is too long":    {nil, func(s *lab.Spec) { s.Files = []lab.File{{Name: "x", Data: make([]byte, maxOneFile+1)}} }, "at most", ""},
		"one file twice":             {nil, func(s *lab.Spec) { s.Files = []lab.File{{Name: "x"}, {Name: "x"}} }, "twice", ""},
	} {
		t.Run(name, func(t *testing.T) {
			rig, log := fakeRig(t, tt.file)
			s := good
			if tt.spec != nil {
				tt.spec(&s)
			}
			_, err := rig.Boot(t.Context(), s)
			labtest.Broken(t, err)
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("want %q in it", tt.want)
			}
			if b, _ := os.ReadFile(log); string(b) != tt.power {
				t.Errorf("power: %q, want %q", b, tt.power)
			}
			if len(rig.busy) > 0 {
				t.Error("the board stays taken")
			}
		})
	}
}

func TestASecondBootWaitsForTheFirst(t *testing.T) {
	rig, _ := fakeRig(t, nil)
	rig.busy <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := rig.Boot(ctx, lab.Spec{Name: "x", Kernel: image(t, "6.1.0-1 (x@y) #1 SMP")})
	labtest.Broken(t, err)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// A line that goes away comes back by itself, and says meanwhile that it is
// gone.
func TestALineComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l := newLine(Line{Socket: path})
	defer l.Close()
	got := make(chan string)
	go func() {
		buf := make([]byte, 100)
		for {
			n, err := l.Read(buf)
			if err != nil {
				close(got)
				return
			}
			got <- string(buf[:n])
		}
	}()
	for _, word := range []string{"one", "two"} {
		if since, why := l.down(); since.IsZero() || why == nil {
			t.Error("a line that is not there is up")
		}
		if n, err := l.Write([]byte("lost")); n != 4 || err != nil {
			t.Errorf("write to a line that is not there: %d, %v", n, err)
		}
		server, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, word)
		if text := <-got; text != word {
			t.Errorf("got %q, want %q", text, word)
		}
		_ = server.Close()
		_ = c.Close()
		for since := (time.Time{}); since.IsZero(); since, _ = l.down() {
			time.Sleep(time.Millisecond)
		}
	}
	_ = l.Close()
	if text, ok := <-got; ok {
		t.Errorf("got %q after the end", text)
	}
}

// An adapter without a cable may be opened, and ends at once.
func TestALineThatBringsNothingStaysDown(t *testing.T) {
	l := newLine(Line{Command: []string{"true"}})
	defer l.Close()
	began, _ := l.down()
	go func() { _, _ = l.Read(make([]byte, 1)) }()
	time.Sleep(3 * reopenEvery)
	for {
		if since, why := l.down(); !since.IsZero() {
			if !since.Equal(began) || why == nil {
				t.Errorf("down since %v, not %v: %v", since, began, why)
			}
			return
		}
	}
}

func TestALineOfAProgram(t *testing.T) {
	l := newLine(Line{Command: []string{"sh", "-c", "read x; echo got $x; echo no route >&2"}})
	defer l.Close()
	done := make(chan string)
	go func() {
		buf := make([]byte, 100)
		n, _ := l.Read(buf)
		done <- string(buf[:n])
		_, _ = l.Read(buf) // its end
	}()
	for up := false; !up; {
		since, _ := l.down()
		up = since.IsZero()
	}
	_, _ = l.Write([]byte("word\n"))
	if got := <-done; got != "got word\n" {
		t.Errorf("got %q", got)
	}
	for {
		if since, why := l.down(); !since.IsZero() {
			if !strings.Contains(why.Error(), "no route") {
				t.Errorf("why: %v", why)
			}
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// A real terminal: bytes arrive as they are, and nobody else gets in.
func TestALineOfATerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	var n, unlocked int32
	for request, arg := range map[uintptr]*int32{syscall.TIOCGPTN: &n, syscall.TIOCSPTLCK: &unlocked} {
		if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, master.Fd(), request, uintptr(unsafe.Pointer(arg))); e != 0 {
			t.Fatal(e)
		}
	}
	c, err := openSerial(fmt.Sprintf("/dev/pts/%d", n), 115200)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	if _, err := c.Write(all); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 256)
	if _, err := io.ReadFull(master, got); err != nil || !bytes.Equal(got, all) {
		t.Errorf("to the board: %q, %v", got, err)
	}
	if _, err := master.Write(all); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, all) {
		t.Errorf("from the board: %q, %v", got, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := openSerial("/dev/null", 115200); err == nil {
		t.Error("/dev/null is no terminal")
	}
}

func TestAConsoleThatIsTooLongIsBroken(t *testing.T) {
	c, err := newConsole(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write([]byte("before"))
	c.size = maxConsoleFile - 1
	_, _ = c.Write([]byte("xx"))
	if _, err := c.text(); err == nil {
		t.Error("lost text was not noticed")
	}
}
