// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/kerneltree"
)

// environment looks for what differs from the distribution's build. It is no
// proof and refuses nothing; it gives a failed match its name.
func (j *job) environment() error {
	e := j.plan.Kernel
	m := &j.result.Match
	if !kerneltree.SameCompiler(j.compiler, e.Compiler) {
		m.Environment = append(m.Environment, match.Setting{Aspect: "compiler", Want: e.Compiler, Have: j.compiler})
	}
	if e.SourceV != e.Version {
		m.Environment = append(m.Environment, match.Setting{Aspect: "source", Want: e.Version, Have: e.SourceV})
	}
	if e.ExtraCFlags != "" {
		m.Environment = append(m.Environment, match.Setting{Aspect: "flags", Want: "none of our own", Have: e.ExtraCFlags})
	}
	diff, err := configDiff(j.tree.Config(), filepath.Join(j.tree.Source(), ".config"))
	if err != nil {
		return err
	}
	for _, d := range diff {
		m.Environment = append(m.Environment, match.Setting{Aspect: "config", Want: d[0], Have: d[1]})
	}
	return nil
}

func environmentHint(env []match.Setting) string {
	var parts []string
	for _, s := range env {
		parts = append(parts, fmt.Sprintf("%s is %s, the kernel's is %s", s.Aspect, s.Have, s.Want))
	}
	return "wrong environment: " + strings.Join(parts, "; ")
}

// maxConfigDiffs limits how many options are named: one is enough to be wrong.
const maxConfigDiffs = 20

// irrelevantOptions differ between the image's config and any rebuild, and
// reach no object code: where keys lie, and what the headers package resets.
var irrelevantOptions = []string{"CONFIG_MODULE_SIG_KEY", "CONFIG_MODULE_SIG_ALL", "CONFIG_SYSTEM_TRUSTED_KEYS", "CONFIG_BUILD_SALT"}

func configDiff(wantFile, haveFile string) ([][2]string, error) {
	want, err := readConfig(wantFile)
	if err != nil {
		return nil, err
	}
	have, err := readConfig(haveFile)
	if err != nil {
		return nil, err
	}
	var out [][2]string
	for _, name := range sortedKeys(want, have) {
		if want[name] == have[name] || slices.Contains(irrelevantOptions, name) || len(out) == maxConfigDiffs {
			continue
		}
		out = append(out, [2]string{describeOption(name, want[name]), describeOption(name, have[name])})
	}
	return out, nil
}

func describeOption(name, value string) string {
	if value == "" {
		return name + " unset"
	}
	return name + "=" + value
}

func readConfig(path string) (map[string]string, error) {
	b, err := durable.ReadFile(path, 4<<20)
	if err != nil {
		return nil, err
	}
	options := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			options[name] = value
		}
	}
	return options, nil
}

func sortedKeys(a, b map[string]string) []string {
	var keys []string
	for k := range a {
		keys = append(keys, k)
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}
