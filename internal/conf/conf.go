// SPDX-License-Identifier: Apache-2.0

// Package conf reads configuration in TOML drop-ins: small files of several
// folders, later ones over earlier ones, as systemd does. An unknown key is an
// error that names file and line, because a misspelled setting that is
// silently ignored is found at night. For each value it is remembered which
// file it came from.
//
// It knows no program's keys: a program brings a struct whose fields are
// pointers (nil is "not written") and checks the values into a type of its
// own. Start with Read.
package conf

import (
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// maxFile limits one drop-in, in bytes. A full one is under 4 KiB.
const maxFile = 64 << 10

// Default is the origin of a value that no file sets.
const Default = "default"

// Folders are the folders of machine programs below a root, lowest first: the
// package's, the owner's, and what lasts until the next boot.
func Folders(root string) []string {
	return []string{
		filepath.Join(root, "usr/lib/klatch/conf.d"),
		filepath.Join(root, "etc/klatch/conf.d"),
		filepath.Join(root, "run/klatch/conf.d"),
	}
}

// Origins maps a key to the place that set it, "file:line".
type Origins map[string]string

// Of is the place that set a key, or Default.
func (o Origins) Of(key string) string {
	if p, ok := o[key]; ok {
		return p
	}
	return Default
}

// Read reads all *.toml files of the folders into written, a pointer to a
// struct with toml tags. Files are taken in the order of their names over all
// folders; a file masks one of the same name in a lower folder, and an empty
// file so switches one off. A folder that is not there is empty.
func Read(folders []string, written any) (Origins, error) {
	files := map[string]string{} // name to path; the highest folder wins
	for _, dir := range folders {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fault.New(fault.Invalid, "config_unreadable", "read configuration: %w", err)
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".toml") && !strings.HasPrefix(e.Name(), ".") {
				files[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)

	origins := Origins{}
	for _, n := range names {
		b, err := durable.ReadFile(files[n], maxFile)
		if err != nil {
			return nil, fault.New(fault.Invalid, "config_unreadable", "read configuration: %w", err)
		}
		if err := merge(files[n], b, written, origins); err != nil {
			return nil, err
		}
	}
	return origins, nil
}

// merge reads one file over what was read before.
func merge(path string, content []byte, written any, origins Origins) error {
	bad := func(line int, text string) error {
		place := path
		if line > 0 { // the decoder does not always know
			place = fmt.Sprintf("%s:%d", path, line)
		}
		return fault.New(fault.Invalid, "config_invalid", "%s: %s", place, text).
			WithHint("correct or remove that line; the config command of the program lists its keys")
	}
	d := toml.NewDecoder(strings.NewReader(string(content))).DisallowUnknownFields()
	err := d.Decode(written)
	if missing, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(missing.Errors) > 0 {
		e := missing.Errors[0]
		line, _ := e.Position()
		return bad(line, fmt.Sprintf("unknown key %q", strings.Join(e.Key(), ".")))
	}
	if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, _ := decode.Position()
		return bad(line, decode.Error())
	}
	if err != nil {
		return bad(0, err.Error())
	}
	// Keys are flat by the rule of this package, so a key's line is the one
	// that begins with it.
	var table map[string]any
	if err := toml.Unmarshal(content, &table); err != nil {
		return bad(0, err.Error())
	}
	known := keys(written)
	for key := range table {
		if !slices.Contains(known, key) { // the decoder does not mind the case
			return bad(lineOf(string(content), key), fmt.Sprintf("unknown key %q", key))
		}
		origins[key] = fmt.Sprintf("%s:%d", path, lineOf(string(content), key))
	}
	return nil
}

// keys lists the toml names of a struct's fields.
func keys(written any) []string {
	var names []string
	for f := range reflect.TypeOf(written).Elem().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		names = append(names, name)
	}
	return names
}

func lineOf(content, key string) int {
	n := 0
	for line := range strings.Lines(content) {
		n++
		name, _, ok := strings.Cut(line, "=")
		if ok && strings.Trim(strings.TrimSpace(name), `"'`) == key {
			return n
		}
	}
	return 0
}

// Duration is a time span as people write it: "90s", "15m", "1h30m"; "0" is
// zero. A bare number is refused: nobody could know its unit. It is the type
// of a field in a written struct.
type Duration struct{ time.Duration }

// UnmarshalText parses; a negative span means nothing here.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%.40q is not a time span such as 90s, 15m or 1h", b)
	}
	if v < 0 {
		return fmt.Errorf("time span %s is negative", v)
	}
	d.Duration = v
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Setting is one key with its value in force and where it came from.
type Setting struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Origin string `json:"origin"`
}

// Settings lists the keys of a struct with toml tags in the order of its
// fields. values holds what is in force, with all defaults filled in.
func Settings(values any, origins Origins) []Setting {
	v := reflect.Indirect(reflect.ValueOf(values))
	var all []Setting
	for i := range v.NumField() {
		key, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
		if key == "" || key == "-" {
			continue
		}
		f := reflect.Indirect(v.Field(i))
		text := ""
		if f.IsValid() {
			text = fmt.Sprint(f.Interface())
			if m, ok := reflect.TypeAssert[encoding.TextMarshaler](f); ok {
				if b, err := m.MarshalText(); err == nil {
					text = string(b)
				}
			}
		}
		all = append(all, Setting{key, text, origins.Of(key)})
	}
	return all
}
