// SPDX-License-Identifier: Apache-2.0

package board

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/lab/guest"
)

// File is a board's file; docs/reference/board.md describes it for people.
type File struct {
	// Name stands in results and errors.
	Name string `toml:"name"`
	// Lock is the file that says who uses the board; beside the board's file
	// when empty.
	Lock string `toml:"lock"`
	// BootSeconds is what the board may take from power-on, or from a
	// restart, to the agent's first word.
	BootSeconds int `toml:"boot_seconds"`

	Line    Line   `toml:"line"`
	Console *Line  `toml:"console"` // nil: the kernel prints on Line
	Power   Power  `toml:"power"`
	Kernel  Kernel `toml:"kernel"`
}

// Line is a way to the board: exactly one of Serial, Socket and Command.
type Line struct {
	Serial  string   `toml:"serial"`  // a terminal of this machine
	Speed   int      `toml:"speed"`   // of Serial, in baud
	Socket  string   `toml:"socket"`  // a Unix socket of a program that has the serial port
	Command []string `toml:"command"` // its standard input and output are the line
}

// Power is how the board is switched: programs of this machine.
type Power struct {
	On    []string `toml:"on"`
	Off   []string `toml:"off"`
	Reset []string `toml:"reset"` // optional; Off and On otherwise
	// OffSeconds is how long the power stays away.
	OffSeconds *int `toml:"off_seconds"`
	// TimeoutSeconds is what each command may take.
	TimeoutSeconds int `toml:"timeout_seconds"`
}

// Kernel is how the board is told what to boot. Without Choose it must start
// the wanted kernel by itself.
type Kernel struct {
	// Choose runs on the board. {release}, {image} and {append} are replaced
	// in each word.
	Choose []string `toml:"choose"`
	// Restart is what follows: "reboot", "power", or "self" when Choose
	// restarts the board.
	Restart string `toml:"restart"`
}

// Limits of a board's file.
const (
	maxFile           = 64 << 10
	defaultBoot       = 300
	maxBoot           = 3600
	defaultOff        = 5
	maxOff            = 600
	defaultPowerLimit = 60
	maxPowerLimit     = 600
)

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// Load reads a board's file.
func Load(path string) (File, error) {
	raw, err := durable.ReadFile(path, maxFile)
	if err != nil {
		return File{}, fault.New(fault.NotFound, "no_board", "read board's file: %w", err).
			WithHint("name a file as in docs/howto/board.md: --board FILE")
	}
	f, err := Parse(raw)
	if err != nil {
		return f, fault.New(fault.Invalid, "bad_board", "board's file %s: %w", path, err).WithHint("docs/reference/board.md")
	}
	if f.Lock == "" {
		f.Lock = filepath.Base(path) + ".lock"
	}
	if !filepath.IsAbs(f.Lock) {
		f.Lock = filepath.Join(filepath.Dir(path), f.Lock)
	}
	return f, nil
}

// Parse checks the text of a board's file and fills in what it leaves out.
func Parse(raw []byte) (File, error) {
	var f File
	if len(raw) > maxFile {
		return f, fmt.Errorf("over %d bytes", maxFile)
	}
	if err := toml.NewDecoder(bytes.NewReader(raw)).DisallowUnknownFields().Decode(&f); err != nil {
		if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
			return f, fmt.Errorf("unknown setting: %s", strings.TrimSpace(strict.String()))
		}
		return f, err
	}
	if !namePattern.MatchString(f.Name) {
		return f, fmt.Errorf("name %.80q: use lower-case letters, digits, dots, dashes", f.Name)
	}
	if err := f.Line.check(); err != nil {
		return f, fmt.Errorf("line: %w", err)
	}
	if f.Console != nil {
		if err := f.Console.check(); err != nil {
			return f, fmt.Errorf("console: %w", err)
		}
	}
	if err := f.Power.check(); err != nil {
		return f, fmt.Errorf("power: %w", err)
	}
	if err := f.Kernel.check(); err != nil {
		return f, fmt.Errorf("kernel: %w", err)
	}
	return f, number(&f.BootSeconds, "boot_seconds", defaultBoot, 1, maxBoot)
}

func (l *Line) check() error {
	n := 0
	for _, set := range []bool{l.Serial != "", l.Socket != "", len(l.Command) > 0} {
		if set {
			n++
		}
	}
	switch {
	case n != 1:
		return errors.New("want one of serial, socket and command")
	case l.Speed != 0 && l.Serial == "":
		return errors.New("speed is for serial only")
	case l.Serial != "" && !filepath.IsAbs(l.Serial), l.Socket != "" && !filepath.IsAbs(l.Socket):
		return fmt.Errorf("%q is not an absolute path", l.Serial+l.Socket)
	}
	if l.Serial != "" {
		if l.Speed == 0 {
			l.Speed = guest.DefaultSpeed
		}
		return guest.CheckSpeed(l.Speed)
	}
	return command(l.Command, len(l.Command) > 0)
}

func (p *Power) check() error {
	for name, c := range map[string][]string{"on": p.On, "off": p.Off, "reset": p.Reset} {
		if err := command(c, name != "reset"); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if p.OffSeconds == nil {
		n := defaultOff
		p.OffSeconds = &n
	}
	if *p.OffSeconds < 0 || *p.OffSeconds > maxOff {
		return fmt.Errorf("off_seconds %d: want 0 to %d", *p.OffSeconds, maxOff)
	}
	return number(&p.TimeoutSeconds, "timeout_seconds", defaultPowerLimit, 1, maxPowerLimit)
}

func (k *Kernel) check() error {
	if len(k.Choose) == 0 {
		if k.Restart != "" {
			return errors.New("restart is for choose only")
		}
		return nil
	}
	if k.Restart == "" {
		k.Restart = restartReboot
	}
	if !slices.Contains([]string{restartReboot, restartPower, restartSelf}, k.Restart) {
		return fmt.Errorf("restart %.40q: want reboot, power or self", k.Restart)
	}
	return command(k.Choose, true)
}

// Ways to restart after the choice of a kernel.
const (
	restartReboot = "reboot"
	restartPower  = "power"
	restartSelf   = "self"
)

func command(argv []string, needed bool) error {
	switch {
	case len(argv) == 0 && !needed:
		return nil
	case len(argv) == 0:
		return errors.New("a command is needed: a list of words")
	case argv[0] == "":
		return errors.New("the program has no name")
	}
	return nil
}

func number(n *int, name string, otherwise, least, most int) error {
	if *n == 0 {
		*n = otherwise
	}
	if *n < least || *n > most {
		return fmt.Errorf("%s %d: want %d to %d", name, *n, least, most)
	}
	return nil
}

// says reports whether Choose uses a placeholder.
func (k Kernel) says(placeholder string) bool {
	return slices.ContainsFunc(k.Choose, func(w string) bool { return strings.Contains(w, placeholder) })
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }
