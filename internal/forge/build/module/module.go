// SPDX-License-Identifier: Apache-2.0

// Package module owns what the livepatch modules of all drivers share: our
// information that is compiled into them, and the look at the finished file
// before anybody signs it. It runs no program. Start with Glue and Inspect.
package module

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	_ "embed" // the glue source
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/archive"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/livepatch"
)

// Glue is our part of a module: what it fixes, for which build. It is compiled
// as GlueName with GlueFlags. GPL-2.0-only.
//
//go:embed glue/klatch-info.c
var Glue []byte

// Forget lets a module that a livepatch reaches go and come again, on kernels
// that cannot do that by themselves. It is compiled as ForgetName, beside
// klatch-modules.h with a line KLATCH_MODULE(name) for each. GPL-2.0-only.
//
//go:embed glue/klatch-forget.c
var Forget []byte

// ForgetName is the file name of Forget, and ForgetObject that of its object.
const (
	ForgetName   = "klatch-forget.c"
	ForgetObject = "klatch-forget.o"
)

// GlueName is the file name of Glue, and GlueObject that of its object.
const (
	GlueName   = "klatch-info.c"
	GlueObject = "klatch-info.o"
)

// Folder is the folder of the external module in the kernel's tree. It is the
// same in every build, because its name reaches the object files.
const Folder = "klatch-module"

// Pack makes a tar archive of files in Folder. The build user unpacks it: root
// would follow links that a bad build left in its scratch folder.
func Pack(files map[string][]byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, n := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: Folder + "/" + n, Mode: 0o644, Size: int64(len(files[n]))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(files[n]); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// GlueFlags are the compiler flags, as a makefile takes them, that Glue needs.
func GlueFlags(p compose.Plan) string {
	return fmt.Sprintf(`-DKLATCH_FIXES='"%s"' -DKLATCH_BUILD_ID='"%s"' -DKLATCH_SEQUENCE='"%d"'`,
		fixes(p), p.Kernel.BuildID, p.Sequence)
}

func fixes(p compose.Plan) string {
	var ids []string
	for _, id := range p.Fixes() {
		ids = append(ids, string(id))
	}
	return strings.Join(ids, ",")
}

// maxName is MODULE_NAME_LEN without the terminating byte
// (include/linux/moduleparam.h: 64 - sizeof(unsigned long)).
const maxName = 55

// CheckName refuses a name that the kernel has no room for.
func CheckName(p compose.Plan) []build.Refusal {
	if n := p.Sequence.ModuleName(); len(n) > maxName {
		return []build.Refusal{build.Refuse("module_name_too_long", n)}
	}
	return nil
}

// maxModinfo limits the section .modinfo, in bytes: 100,000 CVE ids.
const maxModinfo = 2 << 20

// Info reads the key=value words of a module's .modinfo section.
func Info(module []byte) (map[string][]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	sec := f.Section(".modinfo")
	if sec == nil || sec.Type != elf.SHT_PROGBITS || sec.Size > maxModinfo {
		return nil, fault.New(fault.Invalid, "bad_module", "module has no usable .modinfo section")
	}
	data, err := sec.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	out := map[string][]string{}
	for word := range bytes.SplitSeq(data, []byte{0}) {
		if k, v, ok := strings.Cut(string(word), "="); ok {
			out[k] = append(out[k], v)
		}
	}
	return out, nil
}

// Inspect looks whether a finished module says of itself what the plan wants:
// an error is the builder's fault, a refusal the fix's.
func Inspect(module []byte, p compose.Plan) ([]build.Refusal, error) {
	name := p.Sequence.ModuleName()
	info, err := Info(module)
	if err != nil {
		return nil, err
	}
	for _, w := range [][2]string{
		{"name", name}, {"livepatch", "Y"}, {"klatch_fixes", fixes(p)},
		{"klatch_build_id", p.Kernel.BuildID.String()}, {"klatch_sequence", fmt.Sprint(uint32(p.Sequence))},
	} {
		if !slices.Equal(info[w[0]], w[1:]) {
			return nil, fault.New(fault.Internal, "bad_module", "module %s says %s=%q, want %q", name, w[0], info[w[0]], w[1])
		}
	}
	if len(info["vermagic"]) != 1 || !strings.HasPrefix(info["vermagic"][0], string(p.Kernel.Release)+" ") {
		return nil, fault.New(fault.Internal, "bad_module", "module %s has vermagic %q, want %s", name, info["vermagic"], p.Kernel.Release)
	}
	if d := info["depends"]; len(d) > 1 || len(d) == 1 && d[0] != "" {
		r := build.Refuse("needs_module", strings.Join(d, ","))
		r.Detail = "the livepatch would need " + strings.Join(d, ",") + " to be loaded"
		return []build.Refusal{r}, nil
	}
	return nil, nil
}

// Keep writes a finished module into the result folder.
func Keep(module []byte, p compose.Plan, dir string) (*build.Module, error) {
	if len(module) > livepatch.MaxModule {
		return nil, fault.New(fault.Internal, "bad_module", "module of %d bytes, limit %d", len(module), livepatch.MaxModule)
	}
	file := filepath.Join(dir, p.Sequence.ModuleName()+".ko")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := durable.WriteFile(file, module, 0o644); err != nil {
		return nil, err
	}
	sum, err := archive.FileSHA256(file)
	if err != nil {
		return nil, err
	}
	return &build.Module{Path: file, SHA256: sum, Bytes: int64(len(module))}, nil
}
