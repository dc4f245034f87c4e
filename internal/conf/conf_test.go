// SPDX-License-Identifier: Apache-2.0

package conf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"klatch/internal/fault"
)

type written struct {
	Interval *Duration `toml:"check_interval"`
	Level    *string   `toml:"log_level"`
	Tries    *int      `toml:"tries"`
}

// tree writes files below a folder: "etc/a.toml" into folder etc.
func tree(t *testing.T, files map[string]string) (folders []string) {
	t.Helper()
	root := t.TempDir()
	for _, d := range []string{"lib", "etc", "run"} {
		folders = append(folders, filepath.Join(root, d))
	}
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folders
}

func TestRead(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  []Setting // file names relative
		err   string
	}{
		{"no folder at all gives defaults", nil,
			[]Setting{{"check_interval", "", "default"}, {"log_level", "", "default"}, {"tries", "", "default"}}, ""},
		{"a later name wins, and only for what it says",
			map[string]string{"lib/10-a.toml": "check_interval = \"1h\"\nlog_level = \"warn\"\n", "etc/50-b.toml": "\n# ours\ncheck_interval = \"10s\"\n"},
			[]Setting{{"check_interval", "10s", "etc/50-b.toml:3"}, {"log_level", "warn", "lib/10-a.toml:2"}, {"tries", "", "default"}}, ""},
		{"the order is that of the names, not of the folders",
			map[string]string{"lib/90-a.toml": "tries = 1", "etc/50-b.toml": "tries = 2"},
			[]Setting{{"check_interval", "", "default"}, {"log_level", "", "default"}, {"tries", "1", "lib/90-a.toml:1"}}, ""},
		{"an empty file masks the one of the same name",
			map[string]string{"lib/10-a.toml": "tries = 1", "run/10-a.toml": ""},
			[]Setting{{"check_interval", "", "default"}, {"log_level", "", "default"}, {"tries", "", "default"}}, ""},
		{"other files are left alone", map[string]string{"etc/README": "x", "etc/a.toml.dpkg-old": "x", "etc/.a.toml": "x"},
			[]Setting{{"check_interval", "", "default"}, {"log_level", "", "default"}, {"tries", "", "default"}}, ""},
		{"an unknown key is named with file and line",
			map[string]string{"etc/a.toml": "tries = 1\n\ncheck_intervall = \"1h\"\n"}, nil, `etc/a.toml:3: unknown key "check_intervall"`},
		{"a table is unknown too", map[string]string{"etc/a.toml": "[check]\ninterval = \"1h\"\n"}, nil, `etc/a.toml:1: unknown key "check"`},
		{"a word that is no time span is named", map[string]string{"etc/a.toml": "\ncheck_interval = \"soon\"\n"}, nil, `etc/a.toml:2: `},
		{"a bare number is no time span", map[string]string{"etc/a.toml": "check_interval = 60\n"}, nil, `etc/a.toml: "60" is not a time span`},
		{"a key in other letters is unknown", map[string]string{"etc/a.toml": "Tries = 1\n"}, nil, `etc/a.toml:1: unknown key "Tries"`},
		{"a negative time span is refused", map[string]string{"etc/a.toml": "check_interval = \"-1s\"\n"}, nil, `negative`},
		{"a wrong type is refused", map[string]string{"etc/a.toml": "tries = \"many\"\n"}, nil, `etc/a.toml:1: `},
		{"no TOML is refused", map[string]string{"etc/a.toml": "tries = 1\ntries = 2\n"}, nil, `etc/a.toml:2: `},
	} {
		t.Run(tt.name, func(t *testing.T) {
			folders := tree(t, tt.files)
			var w written
			origins, err := Read(folders, &w)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || fault.KindOf(err) != fault.Invalid {
					t.Fatalf("err = %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := Settings(w, origins)
			for i := range got {
				got[i].Origin = strings.TrimPrefix(got[i].Origin, filepath.Dir(folders[0])+"/")
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("settings (-want +got):\n%s", d)
			}
		})
	}
}

func TestReadRefusesALargeFile(t *testing.T) {
	folders := tree(t, map[string]string{"etc/a.toml": strings.Repeat("# x\n", maxFile)})
	if _, err := Read(folders, &written{}); err == nil {
		t.Fatal("no error")
	}
}

func FuzzMerge(f *testing.F) {
	f.Add("tries = 1\ncheck_interval = \"1h\"\n")
	f.Add("\"tries\" = 1\n[log]\nlevel = 1")
	f.Add("check_interval = 07:32:00\n")
	f.Fuzz(func(t *testing.T, s string) {
		var w written
		origins := Origins{}
		if merge("x.toml", []byte(s), &w, origins) != nil {
			return
		}
		if w.Interval != nil && w.Interval.Duration < 0 {
			t.Errorf("negative interval %v", *w.Interval)
		}
		for k := range origins {
			switch k {
			case "check_interval", "log_level", "tries":
			default:
				t.Errorf("key %q was accepted", k)
			}
		}
	})
}
