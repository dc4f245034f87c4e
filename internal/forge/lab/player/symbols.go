// SPDX-License-Identifier: Apache-2.0

package player

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
)

// Tables are the symbol tables that the builder counted positions in. Without
// them the running kernel's symbols are not compared.
type Tables struct {
	Vmlinux string                   // file, as readelf -sW prints it
	Module  func(name string) string // the distribution's own .ko
}

// Limits of what a guest may send and of a table, in bytes.
const (
	maxPacked  = 8 << 20
	maxSymbols = 64 << 20
	maxNamed   = 5 // differences that are told
)

// symbol is one line of a symbol table. Section is 0 in vmlinux and in the
// running kernel, which know addresses.
type symbol struct {
	addr    uint64
	section int
	code    bool
}

// names maps a name to its symbols, in the order in which they are counted.
type names map[string][]symbol

// firstAddress is below every address of the kernel's image; what lies lower
// is an offset, of a per-cpu variable, and does not move with the image.
const firstAddress = 0xffffffff80000000

// symbols compares the running kernel's own list of symbols with the tables
// that the builder used. Everything that a livepatch names is found by name
// and position: a table of another kernel would replace another function.
func (p *Player) symbols(ctx context.Context, _ call) error {
	res, err := p.m.Run(ctx, lab.Command{Argv: []string{"gzip", "-c", "/proc/kallsyms"}, MaxOutput: maxPacked, Timeout: 2 * time.Minute})
	if err != nil {
		return err
	}
	if res.Exit != 0 || res.Truncated {
		return lab.Brokenf(fmt.Errorf("exit status %d: %s", res.Exit, bytes.TrimSpace(res.Stderr)), "read /proc/kallsyms")
	}
	running, err := readKallsyms(res.Stdout)
	if err != nil {
		return lab.Brokenf(err, "read /proc/kallsyms")
	}
	built, err := readTable(p.Tables.Vmlinux)
	if err != nil {
		return lab.Brokenf(err, "read the builder's symbol table")
	}
	compared, different := compareKernel(built, running[""])
	for _, m := range slices.Sorted(maps.Keys(running)) {
		if m == "" || p.Tables.Module == nil || m == p.Built.Sequence.ModuleName() {
			continue
		}
		table, err := readModule(p.Tables.Module(m))
		if err != nil {
			return lab.Brokenf(err, "read module %s", m)
		}
		n, d := compareModule(table, running[m])
		compared += n
		for _, x := range d {
			different = append(different, m+": "+x)
		}
	}
	if len(different) > 0 {
		return lab.Failf("the builder's symbol table is not the running kernel's: %d of %d functions differ: %s",
			len(different), compared, strings.Join(different[:min(len(different), maxNamed)], "; "))
	}
	p.note = fmt.Sprintf("%d functions are where the builder's tables say", compared)
	return nil
}

// positions looks whether the kernel replaced exactly what the build result
// says, by name and position.
func (p *Player) positions(ctx context.Context, _ call) error {
	name := p.Built.Sequence.ModuleName()
	out, err := p.output(ctx, "find", "/sys/kernel/livepatch/"+name, "-mindepth", "2", "-type", "d")
	if err != nil {
		return err
	}
	have := []string{}
	for f := range strings.FieldsSeq(out) {
		have = append(have, strings.TrimPrefix(f, "/sys/kernel/livepatch/"+name+"/"))
	}
	slices.Sort(have)
	want := listed(p.Built)
	if !slices.Equal(have, want) {
		return lab.Failf("the kernel lists %q, built was %q", have, want)
	}
	p.note = fmt.Sprintf("%d functions", len(have))
	return nil
}

// listed is how the kernel lists the functions of a build in sysfs: a name
// that is there once has position 1 (kernel/livepatch/core.c,
// klp_init_object_loaded).
func listed(b build.Result) []string {
	out := []string{}
	for _, p := range b.Match.Replaced {
		out = append(out, fmt.Sprintf("%s/%s,%d", p.Object, p.Function, max(p.Position, 1)))
	}
	slices.Sort(out)
	return out
}

// compareKernel compares all symbols that share their name with a function.
// It returns how many functions it looked at and what differs.
func compareKernel(built, running names) (compared int, different []string) {
	text, have := built["_text"], running["_text"]
	if len(text) != 1 || len(have) != 1 {
		return 0, []string{"one of them has no _text"}
	}
	moved := have[0].addr - text[0].addr // the kernel may be loaded elsewhere (KASLR)
	for _, n := range slices.Sorted(maps.Keys(built)) {
		all := slices.Clone(built[n])
		functions := 0
		for _, s := range all {
			if s.code {
				functions++
			}
		}
		if functions == 0 {
			continue
		}
		compared += functions
		slices.SortStableFunc(all, func(a, b symbol) int {
			if a.addr < b.addr {
				return -1
			}
			return 1
		})
		if why := sameAddresses(all, running[n], moved); why != "" {
			different = append(different, n+" "+why)
		}
	}
	return compared, different
}

func sameAddresses(built, running []symbol, moved uint64) string {
	if len(built) != len(running) {
		return fmt.Sprintf("is there %d times, not %d", len(running), len(built))
	}
	for i, s := range built {
		want := s.addr
		if want >= firstAddress {
			want += moved
		}
		if running[i].addr != want {
			return fmt.Sprintf("%d is at %#x, not at %#x", i+1, running[i].addr, want)
		}
	}
	return ""
}

// compareModule compares a loaded module's functions: each section was moved
// as a whole, and what has one name comes in the same order.
func compareModule(built, running names) (compared int, different []string) {
	moved := map[int]uint64{}
	for _, n := range slices.Sorted(maps.Keys(built)) {
		functions := 0
		for _, s := range built[n] {
			if s.code {
				functions++
			}
		}
		if functions == 0 {
			continue
		}
		compared += functions
		if len(built[n]) != len(running[n]) {
			different = append(different, fmt.Sprintf("%s is there %d times, not %d", n, len(running[n]), len(built[n])))
			continue
		}
		for i, s := range built[n] {
			by, known := moved[s.section]
			if !known {
				by = running[n][i].addr - s.addr
				moved[s.section] = by
			}
			if running[n][i].addr != s.addr+by {
				different = append(different, fmt.Sprintf("%s %d is at %#x, not at %#x", n, i+1, running[n][i].addr, s.addr+by))
			}
		}
	}
	return compared, different
}

// readKallsyms reads "address type name [module]" lines, by module; the
// kernel's own have none.
func readKallsyms(packed []byte) (map[string]names, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(z, maxSymbols+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxSymbols {
		return nil, fault.New(fault.Invalid, "bad_symbols", "over %d bytes", maxSymbols)
	}
	all := map[string]names{"": {}}
	for line := range bytes.Lines(text) {
		w := strings.Fields(string(line))
		if len(w) < 3 {
			return nil, fault.New(fault.Invalid, "bad_symbols", "line %.80q", line)
		}
		addr, err := strconv.ParseUint(w[0], 16, 64)
		if err != nil {
			return nil, fault.New(fault.Invalid, "bad_symbols", "line %.80q: %w", line, err)
		}
		module := ""
		if len(w) > 3 {
			module = strings.Trim(w[3], "[]")
		}
		if all[module] == nil {
			all[module] = names{}
		}
		all[module][w[2]] = append(all[module][w[2]], symbol{addr: addr})
	}
	return all, nil
}

// readTable reads "Num: Value Size Type Bind Vis Ndx Name" lines.
func readTable(file string) (names, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	out := names{}
	sc := bufio.NewScanner(io.LimitReader(f, maxSymbols))
	for sc.Scan() {
		w := strings.Fields(sc.Text())
		if len(w) != 8 || w[6] == "UND" || w[6] == "ABS" || w[3] == "FILE" || w[3] == "SECTION" || w[3] == "Type" {
			continue
		}
		addr, err := strconv.ParseUint(w[1], 16, 64)
		if err != nil {
			return nil, fault.New(fault.Invalid, "bad_symbols", "line %.80q: %w", sc.Text(), err)
		}
		out[w[7]] = append(out[w[7]], symbol{addr: addr, code: w[3] == "FUNC"})
	}
	return out, sc.Err()
}

// readModule reads the symbols of a .ko that stay after its start
// (kernel/module/kallsyms.c, is_core_symbol).
func readModule(file string) (names, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	symbols, err := f.Symbols()
	if err != nil {
		return nil, err
	}
	out := names{}
	for _, s := range symbols {
		if s.Name == "" || s.Section == elf.SHN_UNDEF || int(s.Section) >= len(f.Sections) {
			continue
		}
		sec := f.Sections[s.Section]
		if sec.Flags&elf.SHF_ALLOC == 0 || strings.HasPrefix(sec.Name, ".init") {
			continue
		}
		out[s.Name] = append(out[s.Name], symbol{s.Value, int(s.Section), elf.ST_TYPE(s.Info) == elf.STT_FUNC})
	}
	return out, nil
}
