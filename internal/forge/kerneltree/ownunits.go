// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// maxCmd limits a .cmd file of kbuild, in bytes.
const maxCmd = 4 << 20

// readBuilt reads from a tree that was built what vmlinux and the modules are
// made of, and all files that they are compiled from. kbuild leaves a .cmd
// file beside each object (scripts/Kbuild.include), and for each module a .mod
// file with the objects that it is linked from (scripts/Makefile.build).
func readBuilt(tree string) (Units, []string, error) {
	var all Units
	owner := map[string]string{} // target to module
	sources := map[string]bool{}
	sourceOf := map[string]string{}
	err := filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(tree, p)
		if err != nil {
			return err
		}
		switch name := d.Name(); {
		case d.IsDir() && (rel == "klp-tmp" || rel == "tools" || rel == "scripts" || rel == "Documentation" || rel == "arch/x86/boot" ||
			rel == "arch/x86/tools" || rel == "usr"):
			return filepath.SkipDir // programs of the build, and of user space
		case d.Type().IsRegular() && strings.HasSuffix(name, ".mod"):
			return readMod(p, rel, owner, &all)
		case d.Type().IsRegular() && strings.HasSuffix(name, ".o.cmd"):
			return readCmd(p, rel, sourceOf, sources)
		}
		return nil
	})
	if err != nil {
		return all, nil, err
	}
	for target, source := range sourceOf {
		if strings.HasSuffix(source, ".mod.c") {
			continue
		}
		u := Unit{Source: source, Object: "vmlinux", Target: target}
		if m := owner[target]; m != "" {
			u.Object = m
		}
		all.Units = append(all.Units, u)
	}
	if len(all.Units) < 100 {
		return all, nil, fault.New(fault.Internal, "no_units", "tree %s was built from %d files only", tree, len(all.Units))
	}
	slices.SortFunc(all.Modules, func(a, b Module) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(all.Units, func(a, b Unit) int { return strings.Compare(a.Target+" "+a.Object, b.Target+" "+b.Object) })
	var list []string
	for s := range sources {
		list = append(list, s)
	}
	slices.Sort(list)
	return all, list, nil
}

func readMod(p, rel string, owner map[string]string, all *Units) error {
	b, err := durable.ReadFile(p, maxCmd)
	if err != nil {
		return err
	}
	ko := strings.TrimSuffix(rel, ".mod") + ".ko"
	m := Module{strings.ReplaceAll(strings.TrimSuffix(path.Base(ko), ".ko"), "-", "_"), ko}
	all.Modules = append(all.Modules, m)
	for o := range strings.FieldsSeq(string(b)) {
		if o = path.Clean(o); path.Ext(o) == ".o" {
			owner[o] = m.Name
		}
	}
	return nil
}

// readCmd reads the source of an object and the files that it depends on; an
// object without a source of its own is linked from others.
func readCmd(p, rel string, sourceOf map[string]string, sources map[string]bool) error {
	b, err := durable.ReadFile(p, maxCmd)
	if err != nil {
		return err
	}
	target := path.Join(path.Dir(rel), strings.TrimSuffix(strings.TrimPrefix(path.Base(rel), "."), ".cmd"))
	deps := false
	for raw := range bytes.Lines(b) {
		line := strings.TrimSpace(string(raw))
		source, isSource := "", false
		if strings.HasPrefix(line, "source_") {
			_, source, isSource = strings.Cut(line, " := ")
		}
		switch {
		case isSource && !path.IsAbs(source):
			sourceOf[target] = path.Clean(source)
			sources[path.Clean(source)] = true
		case strings.HasPrefix(line, "deps_"):
			deps = true
		case deps && line == "":
			deps = false
		case deps:
			if d := strings.TrimSpace(strings.TrimSuffix(line, "\\")); d != "" && !strings.HasPrefix(d, "$") && !path.IsAbs(d) {
				sources[path.Clean(d)] = true
			}
		}
	}
	return nil
}

func (t Tree) writeUnits(u Units) error {
	b, err := json.Marshal(u)
	if err != nil {
		return err
	}
	return durable.WriteFile(t.units(), b, 0o644)
}

// takeOwnModules keeps the modules of a folder such as /lib/modules/RELEASE or
// the build folder itself.
func (t Tree) takeOwnModules(dir string) error {
	n := 0
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, ok := moduleName(d.Name())
		if !ok {
			return nil
		}
		ko, err := readOwnModule(p)
		if err != nil {
			return fmt.Errorf("module %s: %w", p, err)
		}
		if f, err := elf.NewFile(bytes.NewReader(ko)); err != nil || f.Type != elf.ET_REL {
			return fault.New(fault.Invalid, "bad_module", "%s is not a module", p)
		}
		n++
		return durable.WriteFile(t.ModuleFile(name), ko, 0o644)
	})
	if err == nil && n == 0 {
		err = fault.New(fault.Invalid, "no_modules", "%s holds no module", dir).
			WithHint("name /lib/modules/RELEASE or the build folder; leave --modules out if the kernel has none")
	}
	return err
}

func moduleName(file string) (string, bool) {
	for _, ext := range []string{".ko", ".ko.xz", ".ko.gz", ".ko.zst"} {
		if base, ok := strings.CutSuffix(file, ext); ok {
			return strings.ReplaceAll(base, "-", "_"), true
		}
	}
	return "", false
}

// readOwnModule reads a module in any compression of the kernel's own
// (CONFIG_MODULE_COMPRESS).
func readOwnModule(file string) ([]byte, error) {
	b, err := readModule(file)
	if err != nil {
		return nil, err
	}
	var r io.Reader
	switch path.Ext(file) {
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(b))
	case ".zst":
		r, err = zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderMaxMemory(maxModule))
	default:
		return b, nil
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_module", "uncompress: %w", err)
	}
	out, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(out) > maxModule {
		err = fault.New(fault.Invalid, "bad_module", "over %d bytes", maxModule)
	}
	return out, err
}
