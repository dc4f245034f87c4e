// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"fmt"
	"io"
	"strings"

	"klatch/internal/fault"
)

// needed lists what a kernel must be configured with to be livepatched by
// klp-build, and refused what klp-build cannot do (scripts/livepatch/klp-build,
// validate_config; kernel/livepatch/Kconfig).
var (
	needed  = []string{"CONFIG_MODULES", "CONFIG_SYSFS", "CONFIG_KALLSYMS_ALL", "CONFIG_LIVEPATCH", "CONFIG_KLP_BUILD"}
	refused = []string{"CONFIG_GCC_PLUGIN_LATENT_ENTROPY", "CONFIG_GCC_PLUGIN_RANDSTRUCT", "CONFIG_LD_DEAD_CODE_DATA_ELIMINATION"}
)

// options reads a .config; what is not set is absent.
func options(config []byte) map[string]string {
	all := map[string]string{}
	for line := range strings.Lines(string(config)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			all[name] = value
		}
	}
	return all
}

// checkConfig says why a config is not that of a vmlinux, as far as it can be
// known, or why its kernel cannot be livepatched.
func checkConfig(config []byte, id identity, inside []byte, name string) error {
	bad := func(code fault.Code, format string, args ...any) *fault.Error {
		return fault.New(fault.Invalid, code, format, args...)
	}
	o := options(config)
	compiler, err := compilerOf(id.banner)
	if err != nil {
		return err
	}
	if want := `"` + compiler + `"`; o["CONFIG_CC_VERSION_TEXT"] != want {
		return bad("other_config", "config %s was made for compiler %s, vmlinux was built with %s", name, o["CONFIG_CC_VERSION_TEXT"], want).
			WithHint("name the .config that the build left beside vmlinux, after make olddefconfig")
	}
	if inside != nil && !bytes.Equal(inside, config) {
		return bad("other_config", "config %s is not the one inside vmlinux: %s", name, firstDifference(options(inside), o)).
			WithHint("take it out of vmlinux: scripts/extract-ikconfig vmlinux > FILE")
	}
	var missing []string
	for _, n := range needed {
		if o[n] != "y" {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		return bad("not_livepatchable", "kernel was built without %s", strings.Join(missing, ", ")).
			WithHint("set CONFIG_LIVEPATCH and CONFIG_KALLSYMS_ALL (docs/howto/own-kernel.md), build, boot and add that kernel; KLP_BUILD follows")
	}
	for _, n := range refused {
		if o[n] == "y" {
			return bad("not_livepatchable", "kernel was built with %s, which klp-build cannot do", n).
				WithHint("build and boot a kernel without it")
		}
	}
	return nil
}

func firstDifference(want, have map[string]string) string {
	say := func(v string) string {
		if v == "" {
			return "not set"
		}
		return v
	}
	for _, m := range []map[string]string{want, have} {
		for n := range m {
			if want[n] != have[n] {
				return fmt.Sprintf("%s is %s there, %s here", n, say(want[n]), say(have[n]))
			}
		}
	}
	return "only comments differ"
}

// Marks around the gzipped config of CONFIG_IKCONFIG (kernel/configs.c).
const (
	configStart = "IKCFG_ST"
	configEnd   = "IKCFG_ED"
)

// embedded takes the config out of a vmlinux, nil where it has none.
func embedded(file string) []byte {
	f, err := elf.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	s := f.Section(".rodata")
	if s == nil || s.Size > maxVmlinux {
		return nil
	}
	rodata, err := s.Data()
	if err != nil {
		return nil
	}
	_, packed, ok := bytes.Cut(rodata, []byte(configStart))
	if !ok {
		return nil
	}
	if packed, _, ok = bytes.Cut(packed, []byte(configEnd)); !ok {
		return nil
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(r, 4<<20))
	if err != nil {
		return nil
	}
	return b
}

// ownKeys are options that name files of the kernel's owner. They reach data
// for certificates and no code; a build here must not need his keys.
var ownKeys = map[string]string{
	"CONFIG_MODULE_SIG_KEY": `"certs/signing_key.pem"`, "CONFIG_SYSTEM_TRUSTED_KEYS": `""`, "CONFIG_SYSTEM_REVOCATION_KEYS": `""`,
	"CONFIG_SYSTEM_BLACKLIST_HASH_LIST": `""`,
}

func withoutKeys(config []byte) []byte {
	var out bytes.Buffer
	for line := range strings.Lines(string(config)) {
		if name, _, ok := strings.Cut(line, "="); ok && ownKeys[name] != "" {
			line = name + "=" + ownKeys[name] + "\n"
		}
		out.WriteString(line)
	}
	return out.Bytes()
}
