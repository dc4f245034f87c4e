// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/sandbox"
)

// prepareTimeout is generous: it takes 10 to 20 s on two cores.
const prepareTimeout = 10 * time.Minute

// unpackSource makes the tree from the source package.
func (m Maker) unpackSource(ctx context.Context, t Tree, source archive.Package, unpacked string) error {
	done := m.Step("unpack " + source.Name + " " + source.Version)
	if err := archive.Unpack(ctx, m.Archive.File(source), unpacked, "./usr/src/linux-source-*.tar.xz"); err != nil {
		return err
	}
	tars, err := filepath.Glob(filepath.Join(unpacked, "usr/src/linux-source-*.tar.xz"))
	if err != nil || len(tars) != 1 {
		return fmt.Errorf("source package %s holds %d archives, want 1", source.Name, len(tars))
	}
	if err := archive.UnpackTar(ctx, tars[0], t.Source()); err != nil {
		return err
	}
	done("")
	return nil
}

// prepare brings the tree to the point where single objects compile as the
// distribution compiled them.
func (m Maker) prepare(ctx context.Context, t Tree, unpacked string, e *catalog.Entry) error {
	headers := filepath.Join(unpacked, "usr/src/linux-headers-"+string(e.Release))
	for _, name := range []string{".config", "Module.symvers"} {
		if err := os.Rename(filepath.Join(headers, name), filepath.Join(t.Source(), name)); err != nil {
			return err
		}
	}
	id, err := identifyFile(t.Vmlinux())
	if err != nil {
		return err
	}
	if e.Compiler, err = compilerOf(id.banner); err != nil {
		return err
	}
	e.CC, _, _ = strings.Cut(e.Compiler, " ")
	root, err := m.root(ctx, e)
	if err != nil {
		return err
	}
	if err := writeSizeProbe(t); err != nil {
		return err
	}
	done := m.Step("prepare the tree (configuration, objtool, structure sizes)")
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	for _, targets := range [][]string{{"prepare", "modules_prepare"}, {"M=" + probeDir, "probe.o"}} {
		res, err := sandbox.Run(ctx, sandbox.Command{Root: root.Dir, Dir: t.Source(), Writable: []string{t.Source()}, Env: sandbox.BaseEnv(), Argv: Make(*e, targets...)})
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			return fault.New(fault.Internal, "prepare", "make %s in %s ended with status %d: %s",
				strings.Join(targets, " "), t.Source(), res.Exit, lastLine(res.Output)).
				WithHint("is %s installed, and flex, bison, bc, python3, libelf-dev, libssl-dev, dwarves? in the source folder: tools/deps build", e.CC)
		}
	}
	sizes, err := probedSizes(filepath.Join(t.Source(), probeDir, "probe.o"))
	if err != nil {
		return err
	}
	b, err := json.Marshal(sizes)
	if err != nil {
		return err
	}
	done("")
	return durable.WriteFile(t.sizes(), b, 0o644)
}

// Make is the command line of make for a kernel: the distribution's compiler
// and release, and nothing that differs from machine to machine.
func Make(e catalog.Entry, more ...string) []string {
	return append([]string{"make", "-j" + strconv.Itoa(runtime.NumCPU()), "-s", "CC=" + e.CC, "HOSTCC=" + e.CC,
		"KERNELRELEASE=" + string(e.Release)}, more...)
}

// lastLine finds the line that says why make stopped: a program that is
// missing, else the compiler's first complaint, else the end.
func lastLine(b []byte) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for _, mark := range []string{"not found", "No such file", "error:", "Error "} {
		for _, l := range lines {
			if strings.Contains(l, mark) {
				return l
			}
		}
	}
	return lines[len(lines)-1]
}

// probeDir is a folder in the tree with a one-file external module.
const probeDir = "klatch-probe"

// sized lists the structures of the special sections that create-diff-object
// handles, with its environment variables (kpatch-build,
// find_special_section_data) and the header that declares each. One with a
// definer exists only in kernels where that file defines it: since 6.8 calls of
// paravirt functions are alternatives like any other.
var sized = []struct{ env, typ, header, config, definer string }{
	{"ALT_STRUCT_SIZE", "struct alt_instr", "asm/alternative.h", "", ""},
	{"BUG_STRUCT_SIZE", "struct bug_entry", "linux/bug.h", "", ""},
	{"EX_STRUCT_SIZE", "struct exception_table_entry", "asm/extable.h", "", ""},
	{"JUMP_STRUCT_SIZE", "struct jump_entry", "linux/jump_label.h", "", ""},
	{"ORC_STRUCT_SIZE", "struct orc_entry", "asm/orc_types.h", "CONFIG_UNWINDER_ORC", ""},
	{"PARA_STRUCT_SIZE", "struct paravirt_patch_site", "asm/paravirt.h", "CONFIG_PARAVIRT", "arch/x86/include/asm/paravirt_types.h"},
	{"STATIC_CALL_STRUCT_SIZE", "struct static_call_site", "linux/static_call_types.h", "CONFIG_HAVE_STATIC_CALL_INLINE", ""},
	{"PRINTK_INDEX_STRUCT_SIZE", "struct pi_entry", "linux/printk.h", "CONFIG_PRINTK_INDEX", ""},
}

// maxHeader limits a header of the kernel that is read, in bytes.
const maxHeader = 4 << 20

// writeSizeProbe writes a source file of ours whose object holds one array per
// structure, as long as the structure: the symbol table then says the sizes,
// for this kernel's headers and config.
func writeSizeProbe(t Tree) error {
	var c bytes.Buffer
	c.WriteString("// SPDX-License-Identifier: GPL-2.0-only\n#include <linux/module.h>\n")
	for _, s := range sized {
		if s.definer != "" {
			text, err := durable.ReadFile(filepath.Join(t.Source(), s.definer), maxHeader)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if !bytes.Contains(text, []byte("\n"+s.typ+" {")) {
				continue
			}
		}
		guard, end := "", ""
		if s.config != "" {
			guard, end = "#ifdef "+s.config+"\n", "#endif\n"
		}
		fmt.Fprintf(&c, "%s#include <%s>\nchar klatch_%s[sizeof(%s)];\n%s", guard, s.header, s.env, s.typ, end)
	}
	dir := filepath.Join(t.Source(), probeDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range map[string][]byte{"probe.c": c.Bytes(), "Makefile": []byte("obj-m := probe.o\n")} {
		if err := durable.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return sandbox.Own(dir)
}

func probedSizes(object string) (map[string]int, error) {
	b, err := durable.ReadFile(object, 4<<20) // of the build user: perhaps a link
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("symbols of %s: %w", object, err)
	}
	sizes := map[string]int{}
	for _, s := range symbols {
		if env, ok := strings.CutPrefix(s.Name, "klatch_"); ok && strings.HasSuffix(env, "_STRUCT_SIZE") {
			sizes[env] = int(s.Size) //nolint:gosec // a few bytes; a wrong one fails the build
		}
	}
	if sizes["ALT_STRUCT_SIZE"] == 0 || sizes["BUG_STRUCT_SIZE"] == 0 {
		return nil, fmt.Errorf("symbols of %s hold no structure sizes", object)
	}
	return sizes, nil
}

func (t Tree) sizes() string { return filepath.Join(t.Dir, "sizes.json") }

func readSizes(t Tree) (map[string]int, error) {
	b, err := durable.ReadFile(t.sizes(), 64<<10)
	if err != nil {
		return nil, err
	}
	var sizes map[string]int
	if err := json.Unmarshal(b, &sizes); err != nil {
		return nil, fmt.Errorf("read %s: %w", t.sizes(), err)
	}
	return sizes, nil
}
