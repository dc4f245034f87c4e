// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"debug/dwarf"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/ulikunitz/xz"
	"golang.org/x/sync/errgroup"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Unit is one source file that the kernel build was compiled from, as its
// debug information names it.
type Unit struct {
	Source string // .c or .S, clean path in the tree
	Object string // "vmlinux", or the module's name with underscores
	Target string // the object file as the kernel's makefiles call it
}

// Module is a loadable module of the kernel build.
type Module struct {
	Name string // with underscores, as the kernel calls it
	Path string // of the .ko in the tree of modules, such as kernel/net/sctp/sctp.ko
}

// Units is what the kernel build consists of.
type Units struct {
	Units   []Unit
	Modules []Module

	bySource map[string][]Unit
	byName   map[string]Module
}

// Of lists the units that were compiled from a source file. None means that
// this kernel build does not have it.
func (u *Units) Of(source string) []Unit { return u.bySource[source] }

// Module finds a module by name.
func (u *Units) Module(name string) (Module, bool) {
	m, ok := u.byName[name]
	return m, ok
}

// Limits of what is read from a distribution's debug package, in bytes.
const (
	maxDebugModule = 512 << 20
	maxDebugInfo   = 1 << 30
	maxModule      = 128 << 20
	maxUnits       = 64 << 20 // the list itself
)

func (t Tree) units() string { return filepath.Join(t.Dir, "units.json") }

// ModuleFile is the distribution's own .ko, uncompressed.
func (t Tree) ModuleFile(name string) string { return filepath.Join(t.Dir, "modules", name+".ko") }

// ModuleSymbols is the symbol table of a module with its FILE symbols, in the
// form of Symbols.
func (t Tree) ModuleSymbols(name string) string {
	return filepath.Join(t.Dir, "modules", name+".symtab")
}

// Units reads what the kernel build consists of.
func (t Tree) Units() (*Units, error) {
	b, err := durable.ReadFile(t.units(), maxUnits)
	if err != nil {
		return nil, err
	}
	var u Units
	if err := json.Unmarshal(b, &u); err != nil {
		return nil, fmt.Errorf("read %s: %w", t.units(), err)
	}
	u.bySource, u.byName = map[string][]Unit{}, map[string]Module{}
	for _, n := range u.Units {
		u.bySource[n.Source] = append(u.bySource[n.Source], n)
	}
	for _, m := range u.Modules {
		u.byName[m.Name] = m
	}
	return &u, nil
}

// takeModules reads the units of vmlinux and of every module out of the debug
// package and keeps each module with its symbol table. The distribution's
// module and its debug twin must have one build id.
func (m Maker) takeModules(t Tree, unpacked, release string) error {
	done := m.Step("read what the kernel and its modules are made of")
	shipped := filepath.Join(unpacked, "lib/modules", release)
	if _, err := os.Stat(shipped); errors.Is(err, fs.ErrNotExist) { // Debian 13 moved it
		shipped = filepath.Join(unpacked, "usr/lib/modules", release)
	}
	debug := filepath.Join(unpacked, "usr/lib/debug/lib/modules", release)
	if err := os.MkdirAll(filepath.Join(t.Dir, "modules"), 0o755); err != nil {
		return err
	}
	var all Units
	vm, err := unitsOf(filepath.Join(unpacked, "usr/lib/debug/boot/vmlinux-"+release), "vmlinux")
	if err != nil {
		return err
	}
	all.Units = vm
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	err = filepath.WalkDir(shipped, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.Contains(d.Name(), ".ko") {
			return err
		}
		rel, err := filepath.Rel(shipped, p)
		if err != nil {
			return err
		}
		rel = strings.TrimSuffix(rel, ".xz")
		g.Go(func() error {
			mod := Module{strings.ReplaceAll(strings.TrimSuffix(path.Base(rel), ".ko"), "-", "_"), rel}
			units, err := t.takeModule(mod, p, filepath.Join(debug, rel))
			if err != nil {
				return fmt.Errorf("module %s: %w", rel, err)
			}
			mu.Lock()
			defer mu.Unlock()
			all.Modules = append(all.Modules, mod)
			all.Units = append(all.Units, units...)
			return nil
		})
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	slices.SortFunc(all.Modules, func(a, b Module) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(all.Units, func(a, b Unit) int {
		return strings.Compare(a.Target+" "+a.Object, b.Target+" "+b.Object)
	})
	all.Units = slices.Compact(all.Units)
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	done(fmt.Sprintf("%d source files, %d modules", len(all.Units), len(all.Modules)))
	return durable.WriteFile(t.units(), b, 0o644)
}

func (t Tree) takeModule(mod Module, shipped, debug string) ([]Unit, error) {
	ko, err := readModule(shipped)
	if err != nil {
		return nil, err
	}
	a, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_module", "read ELF: %w", err)
	}
	f, err := elf.Open(debug)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_module", "its debug information: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	if ours, theirs := buildNote(a), buildNote(f); len(ours) == 0 || !bytes.Equal(ours, theirs) {
		return nil, fault.New(fault.Untrusted, "symbols_mismatch", "module and debug information have build notes %x and %x", ours, theirs)
	}
	symbols, err := printSymbols(f)
	if err != nil {
		return nil, err
	}
	// Torn files are made again with the whole tree: its marker comes last.
	if err := os.WriteFile(t.ModuleFile(mod.Name), ko, 0o644); err != nil { //nolint:forbidigo // see above
		return nil, err
	}
	if err := os.WriteFile(t.ModuleSymbols(mod.Name), symbols, 0o644); err != nil { //nolint:forbidigo // see above
		return nil, err
	}
	return unitsOf(debug, mod.Name)
}

func readModule(file string) ([]byte, error) {
	b, err := durable.ReadFile(file, maxModule)
	if err != nil || !strings.HasSuffix(file, ".xz") {
		return b, err
	}
	r, err := xz.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_module", "uncompress: %w", err)
	}
	out, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(out) > maxModule {
		err = fault.New(fault.Invalid, "bad_module", "over %d bytes", maxModule)
	}
	return out, err
}

func buildNote(f *elf.File) []byte {
	s := f.Section(".note.gnu.build-id")
	if s == nil || s.Size > 4096 {
		return nil
	}
	b, err := s.Data()
	if err != nil {
		return nil
	}
	return b
}

// printSymbols writes a symbol table as readelf -sW does, the form that
// create-diff-object reads (lookup.c, symtab_read).
func printSymbols(f *elf.File) ([]byte, error) {
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols: %w", err)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "\nSymbol table '.symtab' contains %d entries:\n   Num:    Value          Size Type    Bind   Vis      Ndx Name\n", len(symbols)+1)
	fmt.Fprintf(&out, "%6d: %016x %5d %-7s %-6s %-8s %4s \n", 0, 0, 0, "NOTYPE", "LOCAL", "DEFAULT", "UND")
	for i, s := range symbols {
		index := strconv.Itoa(int(s.Section))
		if name, ok := special[s.Section]; ok {
			index = name
		}
		word := func(s string) string { _, w, _ := strings.Cut(s, "_"); return w }
		name := s.Name
		if elf.ST_TYPE(s.Info) == elf.STT_SECTION && int(s.Section) < len(f.Sections) {
			name = f.Sections[s.Section].Name
		}
		fmt.Fprintf(&out, "%6d: %016x %5d %-7s %-6s %-8s %4s %s\n", i+1, s.Value, s.Size, word(elf.ST_TYPE(s.Info).String()),
			word(elf.ST_BIND(s.Info).String()), word(elf.ST_VISIBILITY(s.Other).String()), index, name)
	}
	return out.Bytes(), nil
}

// special are the sections that readelf names (ELF gABI, special section indexes).
var special = map[elf.SectionIndex]string{elf.SHN_UNDEF: "UND", elf.SHN_ABS: "ABS", elf.SHN_COMMON: "COM"}

// unitsOf reads the names of the compilation units (DWARF 5, section 3.1.1)
// and nothing else of the debug information, which is large.
func unitsOf(file, object string) ([]Unit, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if object != "vmlinux" && st.Size() > maxDebugModule {
		return nil, fault.New(fault.Invalid, "bad_module", "debug information of %d bytes, limit %d", st.Size(), maxDebugModule)
	}
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	names, err := unitNames(f)
	if err != nil {
		return nil, fmt.Errorf("debug information of %s: %w", filepath.Base(file), err)
	}
	var out []Unit
	for _, n := range names {
		ext := path.Ext(n)
		if strings.HasSuffix(n, ".mod.c") || path.IsAbs(n) || ext != ".c" && ext != ".S" {
			continue
		}
		out = append(out, Unit{Source: path.Clean(n), Object: object, Target: strings.TrimSuffix(n, ext) + ".o"})
	}
	return out, nil
}

// unitHead is how much of a unit is relocated: its header and the first
// attributes of its first entry, among them the name.
const unitHead = 96

func unitNames(f *elf.File) ([]string, error) {
	data := map[string][]byte{}
	for _, n := range []string{".debug_info", ".debug_abbrev", ".debug_str", ".debug_line_str", ".debug_addr", ".debug_str_offsets"} {
		s := f.Section(n)
		if s == nil {
			continue
		}
		if s.Size > maxDebugInfo {
			return nil, fault.New(fault.Invalid, "bad_dwarf", "section %s has %d bytes", n, s.Size)
		}
		b, err := s.Data()
		if err != nil {
			return nil, err
		}
		data[n] = b
	}
	info := data[".debug_info"]
	var starts []int
	for off := 0; off+12 <= len(info); {
		n := int(binary.LittleEndian.Uint32(info[off:]))
		if n < 8 || n >= 0xfffffff0 || off+4+n > len(info) {
			return nil, fault.New(fault.Invalid, "bad_dwarf", "unit at %#x has length %#x", off, n)
		}
		starts = append(starts, off)
		off += 4 + n
	}
	if f.Type == elf.ET_REL {
		if err := relocateHeads(f, info, starts); err != nil {
			return nil, err
		}
	}
	d, err := dwarf.New(data[".debug_abbrev"], nil, nil, info, nil, nil, nil, data[".debug_str"])
	if err != nil {
		return nil, err
	}
	for _, n := range []string{".debug_line_str", ".debug_addr", ".debug_str_offsets"} {
		if data[n] != nil {
			if err := d.AddSection(n, data[n]); err != nil {
				return nil, err
			}
		}
	}
	var names []string
	r := d.Reader()
	for _, off := range starts {
		header := 11 // version, abbreviations, address size (DWARF 4, 7.5.1.1)
		if binary.LittleEndian.Uint16(info[off+4:]) >= 5 {
			header = 12 // and the kind of unit (DWARF 5, 7.5.1)
		}
		r.Seek(dwarf.Offset(off + header)) //nolint:gosec // below the section's size
		e, err := r.Next()
		if err != nil {
			return nil, err
		}
		if e == nil || e.Tag != dwarf.TagCompileUnit {
			continue
		}
		if n, ok := e.Val(dwarf.AttrName).(string); ok {
			names = append(names, n)
		}
	}
	return names, nil
}

// relocateHeads applies the relocations of the units' heads, as the linker
// would: the value is that of the symbol, a section's start, plus the addend.
func relocateHeads(f *elf.File, info []byte, starts []int) error {
	s := f.Section(".rela.debug_info")
	if s == nil {
		return nil
	}
	if s.Size > maxDebugInfo {
		return fault.New(fault.Invalid, "bad_dwarf", "section %s has %d bytes", s.Name, s.Size)
	}
	rela, err := s.Data()
	if err != nil {
		return err
	}
	const entry = 24 // Elf64_Rela
	i := 0
	for ; len(rela) >= entry; rela = rela[entry:] {
		off := binary.LittleEndian.Uint64(rela)
		for i+1 < len(starts) && off >= uint64(starts[i+1]) { //nolint:gosec // offsets in a section
			i++
		}
		kind := elf.R_X86_64(binary.LittleEndian.Uint32(rela[8:]))
		if len(starts) == 0 || off < uint64(starts[i]) || off-uint64(starts[i]) > unitHead || //nolint:gosec // as above
			kind != elf.R_X86_64_32 || off+4 > uint64(len(info)) {
			continue
		}
		binary.LittleEndian.PutUint32(info[off:], uint32(binary.LittleEndian.Uint64(rela[16:]))) //nolint:gosec // R_X86_64_32 keeps the low half
	}
	return nil
}
