// SPDX-License-Identifier: Apache-2.0

// Package touch says from a file's name and place alone what it is to a
// kernel build: source that was compiled or included, source that this kernel
// was not built from, or something that no livepatch can replace. Start
// reading at Of.
package touch

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/kerneltree"
)

// Kernel is what is known of one kernel build. It is safe for concurrent use.
type Kernel struct {
	Tree      kerneltree.Tree
	Units     *kerneltree.Units
	Includers func(file string) []string // compiled files that include it
	Defines   func(symbol string) bool   // vmlinux has it

	once    sync.Once
	modules [][]byte // symbol tables of all modules
	failed  error
}

// imageFolders hold code that is copied or gone once the kernel runs, and what
// is compiled into the vDSO too: it is in no list of the kernel's units.
var imageFolders = []string{"arch/x86/boot/", "arch/x86/realmode/", "arch/x86/entry/vdso/", "arch/x86/purgatory/", "lib/vdso/",
	"include/vdso/", "arch/x86/include/asm/vdso/"}

// Of gives a file's code in the catalog of refusals; "not_built" where this
// kernel was not built from it, and "" where it was compiled or included.
func (k *Kernel) Of(file string) (fault.Code, error) {
	if len(k.Units.Of(file)) > 0 && path.Ext(file) != ".S" {
		return "", nil
	}
	if otherArchitecture(file) {
		return "not_built", nil
	}
	if slices.ContainsFunc(imageFolders, func(p string) bool { return strings.HasPrefix(file, p) }) {
		return "boot_image", nil
	}
	switch path.Ext(file) {
	case ".S":
		if strings.HasSuffix(file, ".lds.S") {
			return "not_code", nil
		}
		return k.assembly(file)
	case ".c", ".h", ".inc":
		if len(k.Includers(file)) > 0 {
			return "", nil
		}
		return "not_built", nil
	}
	for _, p := range []string{"Documentation/", "tools/", "samples/"} {
		if strings.HasPrefix(file, p) {
			return "not_built", nil
		}
	}
	return "not_code", nil
}

func otherArchitecture(file string) bool {
	rest, ok := strings.CutPrefix(file, "arch/")
	return ok && strings.Contains(rest, "/") && !strings.HasPrefix(rest, "x86/")
}

const maxSource = 16 << 20 // bytes

// label finds the symbols that an assembly file defines
// (Documentation/core-api/asm-annotations.rst).
var label = regexp.MustCompile(`(?m)^\s*(?:SYM_(?:FUNC|CODE|INNER|TYPED|DATA)\w*|ENTRY|GLOBAL|\.globa?l)[ \t(]+([A-Za-z_]\w+)`)

// assembly tells whether the kernel was built from an assembly file. The debug
// information does not name it, so its symbols must: where none of them is in
// the kernel or in a module it is not built. A file without symbols is taken
// for built.
func (k *Kernel) assembly(file string) (fault.Code, error) {
	if strings.HasSuffix(file, "_32.S") { // the makefiles choose by $(BITS)
		return "not_built", nil
	}
	text, err := durable.ReadFile(filepath.Join(k.Tree.Source(), file), maxSource)
	if errors.Is(err, fs.ErrNotExist) {
		return "assembly", nil
	}
	if err != nil {
		return "", err
	}
	names := label.FindAllSubmatch(text, -1)
	for _, n := range names {
		has := k.Defines(string(n[1]))
		if !has {
			if has, err = k.inModule(n[1]); err != nil {
				return "", err
			}
		}
		if has {
			return "assembly", nil
		}
	}
	if len(names) == 0 {
		return "assembly", nil
	}
	return "not_built", nil
}

const maxTable = 64 << 20 // a module's symbol table, in bytes

func (k *Kernel) inModule(symbol []byte) (bool, error) {
	k.once.Do(func() {
		for _, m := range k.Units.Modules {
			b, err := durable.ReadFile(k.Tree.ModuleSymbols(m.Name), maxTable)
			if err != nil {
				k.failed = err
				return
			}
			k.modules = append(k.modules, b)
		}
	})
	line := append(append([]byte(" "), symbol...), '\n')
	return slices.ContainsFunc(k.modules, func(t []byte) bool { return bytes.Contains(t, line) }), k.failed
}

// Symbols are those that code may refer to, by who has them.
type Symbols struct {
	tree     kerneltree.Tree
	kernel   map[string]bool   // global symbols of vmlinux
	exported map[string]string // by vmlinux or a module

	mu      sync.Mutex
	modules map[string]*module
}

type module struct {
	global  map[string]bool
	depends []string
}

// ReadSymbols reads the symbols of a kernel build; those of a module only when
// it is asked for.
func ReadSymbols(t kerneltree.Tree) (*Symbols, error) {
	s := &Symbols{tree: t, exported: map[string]string{}, modules: map[string]*module{}}
	var err error
	if s.kernel, err = globals(t.Symbols()); err != nil {
		return nil, err
	}
	b, err := durable.ReadFile(filepath.Join(t.Source(), "Module.symvers"), 16<<20)
	if err != nil {
		return nil, err
	}
	for line := range bytes.Lines(b) { // "CRC symbol object type namespace" (scripts/mod/modpost.c)
		if w := strings.Fields(string(line)); len(w) > 2 {
			s.exported[w[1]] = strings.ReplaceAll(path.Base(w[2]), "-", "_")
		}
	}
	return s, nil
}

func globals(file string) (map[string]bool, error) {
	b, err := os.ReadFile(file) // of our own making
	if err != nil {
		return nil, err
	}
	all := map[string]bool{}
	for line := range bytes.Lines(b) { // "Num: Value Size Type Bind Vis Ndx Name", as readelf -s prints
		if w := bytes.Fields(line); len(w) == 8 && string(w[6]) != "UND" && string(w[4]) != "LOCAL" {
			all[string(w[7])] = true
		}
	}
	return all, nil
}

// Kernel says whether vmlinux has a global symbol of this name.
func (s *Symbols) Kernel(name string) bool { return s.kernel[name] }

// Use says whether the code of an object, vmlinux or a module, can refer to a
// symbol of the running kernel: "" if so, "symbol_missing", or "needs_module"
// with the module that would have to be there.
func (s *Symbols) Use(object, name string) (code fault.Code, owner string, err error) {
	owner, exported := s.exported[name]
	if object == "vmlinux" {
		switch {
		case s.kernel[name]:
			return "", "", nil
		case exported:
			return "needs_module", owner, nil
		}
		return "symbol_missing", "", nil
	}
	m, err := s.module(object)
	switch {
	case err != nil:
		return "", "", err
	case m.global[name], exported && (owner == "vmlinux" || owner == object || slices.Contains(m.depends, owner)):
		return "", "", nil
	case exported:
		return "needs_module", owner, nil
	}
	return "symbol_missing", "", nil
}

// Exports says whether an object exports a symbol.
func (s *Symbols) Exports(object, name string) bool {
	owner, ok := s.exported[name]
	return ok && owner == object
}

func (s *Symbols) module(name string) (*module, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.modules[name]; m != nil {
		return m, nil
	}
	var m module
	var err error
	if m.global, err = globals(s.tree.ModuleSymbols(name)); err != nil {
		return nil, err
	}
	ko, err := durable.ReadFile(s.tree.ModuleFile(name), 128<<20)
	if err != nil {
		return nil, err
	}
	if d := depends.FindSubmatch(ko); d != nil {
		for n := range strings.SplitSeq(string(d[1]), ",") {
			m.depends = append(m.depends, strings.ReplaceAll(n, "-", "_"))
		}
	}
	s.modules[name] = &m
	return &m, nil
}

// depends finds the line of .modinfo that names the modules which are there
// whenever this one is.
var depends = regexp.MustCompile(`\x00depends=([^\x00]*)\x00`)
