// SPDX-License-Identifier: Apache-2.0

package archive_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/server/archive"
)

var content = map[string]string{"metadata/timestamp.json": "{}", "targets/a": strings.Repeat("x", 1000), "log/empty": ""}

func line(name string) archive.File {
	sum := sha256.Sum256([]byte(content[name]))
	return archive.File{Name: name, Bytes: int64(len(content[name])), SHA256: hex.EncodeToString(sum[:])}
}

func manifest() archive.Manifest {
	return archive.Manifest{Publisher: "acme", Files: []archive.File{line("metadata/timestamp.json"), line("log/empty"), line("targets/a")}}
}

func encode(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	err := archive.Write(t.Context(), &b, manifest(), func(_ context.Context, name string) ([]byte, error) { return []byte(content[name]), nil })
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func allowed(name string) bool { _, ok := content[name]; return ok }

func open(t testing.TB, b []byte) (*archive.Archive, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := archive.Open(path, allowed)
	if err == nil {
		t.Cleanup(func() { a.Close() })
	}
	return a, err
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	a, err := open(t, encode(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Check(t.Context(), nil); err != nil || a.Publisher != "acme" || len(a.Files) != 3 {
		t.Errorf("%+v, %v", a.Manifest, err)
	}
	for name, want := range content {
		r, ok := a.Read(name)
		if !ok || !a.Has(name) {
			t.Errorf("%s is not there", name)
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if _, ok := a.Read("targets/b"); ok || a.Has("targets/b") {
		t.Error("a file that is not in it")
	}
}

func TestAFileThatChangesMeanwhileIsNotExported(t *testing.T) {
	err := archive.Write(t.Context(), io.Discard, manifest(), func(_ context.Context, name string) ([]byte, error) { return []byte(content[name] + "!"), nil })
	if fault.CodeOf(err) != "export_changed" {
		t.Error(err)
	}
}

// with makes an archive of any list and any bytes behind it.
func with(change func(m *archive.Manifest), tail string) []byte {
	m := manifest()
	change(&m)
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return fmt.Appendf(nil, "klatch-export/1 %d\n%s%s", len(b), b, tail)
}

func TestHostileFiles(t *testing.T) {
	body := content["metadata/timestamp.json"] + content["targets/a"]
	for name, b := range map[string][]byte{
		"nothing":                     nil,
		"something else":              []byte("PK\x03\x04"),
		"another version":             bytes.Replace(encode(t), []byte("/1 "), []byte("/2 "), 1),
		"no number":                   []byte("klatch-export/1 x\n"),
		"a number below zero":         []byte("klatch-export/1 -5\n"),
		"a number with a leading nil": []byte("klatch-export/1 05\n{}   "),
		"a list longer than the file": []byte("klatch-export/1 900\n{}"),
		"a list longer than allowed":  []byte("klatch-export/1 999999999\n{}"),
		"no line end":                 []byte("klatch-export/1 2"),
		"a list that is no JSON":      []byte("klatch-export/1 2\n}{"),
		"a path upwards":              with(func(m *archive.Manifest) { m.Files[0].Name = "../etc/passwd" }, body),
		"an absolute path":            with(func(m *archive.Manifest) { m.Files[0].Name = "/metadata/timestamp.json" }, body),
		"an empty name":               with(func(m *archive.Manifest) { m.Files[0].Name = "" }, body),
		"a name twice":                with(func(m *archive.Manifest) { m.Files[1] = m.Files[0] }, body+"{}"),
		"a length below zero":         with(func(m *archive.Manifest) { m.Files[0].Bytes = -2 }, body),
		"a length that overflows":     with(func(m *archive.Manifest) { m.Files[0].Bytes = 1<<63 - 1 }, body),
		"a length over the limit":     with(func(m *archive.Manifest) { m.Files[0].Bytes = archive.MaxFile + 1 }, body),
		"lengths that add up to more": with(func(m *archive.Manifest) { m.Files[0].Bytes++ }, body),
		"bytes after the end":         with(func(*archive.Manifest) {}, body+"x"),
		"no digest":                   with(func(m *archive.Manifest) { m.Files[0].SHA256 = "" }, body),
		"a file cut off":              encode(t)[:len(encode(t))-1],
	} {
		if _, err := open(t, b); fault.CodeOf(err) != "export_malformed" || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	a, err := open(t, with(func(*archive.Manifest) {}, strings.Replace(body, "x", "y", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Check(t.Context(), nil); fault.CodeOf(err) != "export_damaged" || !strings.Contains(err.Error(), "1 of 3 files") || !strings.Contains(err.Error(), "targets/a") {
		t.Error(err)
	}
}

func TestOnlyARegularFileIsOpened(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, dir, filepath.Join(dir, "none")} {
		if _, err := archive.Open(path, allowed); err == nil {
			t.Errorf("%s was opened", path)
		}
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(encode(f))
	f.Add([]byte("klatch-export/1 2\n{}"))
	f.Add(with(func(m *archive.Manifest) { m.Files[0].Bytes = 1 << 62 }, "x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := archive.Parse(bytes.NewReader(b), int64(len(b)), allowed)
		if err != nil {
			return
		}
		for _, x := range a.Files {
			r, ok := a.Read(x.Name)
			if !ok {
				t.Fatal("a file of the list is not there")
			}
			if n, err := io.Copy(io.Discard, r); err != nil || n != x.Bytes {
				t.Fatalf("%d bytes of %d: %v", n, x.Bytes, err)
			}
		}
	})
}
