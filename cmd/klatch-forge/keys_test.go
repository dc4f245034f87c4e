// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/testkit"
	"klatch/internal/testkit/softhsm"
)

// runForge runs one command line in this process.
func runForge(t *testing.T, input string, args ...string) (string, error) {
	t.Helper()
	c := root()
	var outs bytes.Buffer
	c.SetOut(&outs)
	c.SetErr(&outs)
	c.SetIn(strings.NewReader(input))
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return outs.String(), err
}

func mustRun(t *testing.T, input string, args ...string) string {
	t.Helper()
	out, err := runForge(t, input, args...)
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return out
}

type listed struct {
	Roles []struct {
		Name    string
		Version int64
		Keys    []struct{ ID, File string }
	}
	Calendar []struct{ What, Level string }
	Pending  []string
}

func listKeys(t *testing.T, dir string) (l listed) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustRun(t, "", "--dir", dir, "keys", "list", "--json")), &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// TestKeysWithSeveralPeople: three people make keys of their own under a
// passphrase, take over the root, and sign the next ceremony on copies of a
// file. The commands are those of docs/howto/keys-and-ceremonies.md.
func TestKeysWithSeveralPeople(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(secret, []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(keyfile.PassphraseEnv, secret)
	dir, people := filepath.Join(t.TempDir(), "data"), t.TempDir()
	mustRun(t, "", "init", dir, "--profile", "small", "--publisher", "example.org")
	mustRun(t, "", "--dir", dir, "keys", "role", "debian-12/amd64")
	before := listKeys(t, dir)
	if len(before.Roles) != 5 || before.Roles[0].Name != "root" || before.Roles[2].Name != "debian-12-amd64" {
		t.Fatalf("%+v", before)
	}
	var pubs, out []string
	for _, name := range []string{"anna", "bert", "cleo"} {
		key := filepath.Join(people, name+".key")
		mustRun(t, "", "keys", "make", key)
		b, err := os.ReadFile(key)
		if err != nil || !bytes.Contains(b, []byte("KLATCH ENCRYPTED FILE")) {
			t.Errorf("%s: %s, %v", name, b, err)
		}
		pubs = append(pubs, filepath.Join(people, name+".pub"))
	}
	for _, k := range before.Roles[0].Keys {
		out = append(out, k.ID[:12])
	}
	rotate := []string{"--dir", dir, "keys", "rotate", "root", "--add", strings.Join(pubs, ","), "--remove", strings.Join(out, ",")}

	// The new keys must sign the new root too, and are not here.
	if said := mustRun(t, "", append(rotate, "--dry-run")...); !strings.Contains(said, "not enough signatures") {
		t.Error(said)
	}
	if l := listKeys(t, dir); len(l.Pending) != 0 || l.Roles[0].Version != 1 {
		t.Errorf("the rehearsal wrote something: %+v", l)
	}
	mustRun(t, "", rotate...)
	pending := listKeys(t, dir).Pending
	if len(pending) != 1 {
		t.Fatalf("pending %q", pending)
	}
	var copies []string
	for _, name := range []string{"anna", "cleo"} {
		carried := filepath.Join(people, name+"-copy.json")
		b, err := os.ReadFile(pending[0])
		if err == nil {
			err = os.WriteFile(carried, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		key := filepath.Join(people, name+".key")
		if said, err := runForge(t, "no\n", "keys", "sign", carried, "--key", key); fault.CodeOf(err) != "not_signed" {
			t.Errorf("an answer of no: %v\n%s", err, said)
		}
		said := mustRun(t, "yes\n", "keys", "sign", carried, "--key", key)
		if !strings.Contains(said, "NEW") || !strings.Contains(said, "digest of what is signed") {
			t.Errorf("signed blindly: %s", said)
		}
		if _, err := runForge(t, "yes\n", "keys", "sign", carried, "--key", key); fault.CodeOf(err) != "nothing_signed" {
			t.Errorf("signing twice: %v", err)
		}
		copies = append(copies, carried)
	}
	if said := mustRun(t, "", "--dir", dir, "keys", "complete", copies[0]); !strings.Contains(said, "missing") || listKeys(t, dir).Roles[0].Version != 1 {
		t.Errorf("one holder of two: %s", said)
	}
	said := mustRun(t, "", append([]string{"--dir", dir, "keys", "complete"}, copies...)...)
	if !strings.Contains(said, "a new machine that begins at the anchor accepts it") {
		t.Error(said)
	}
	after := listKeys(t, dir)
	if after.Roles[0].Version != 2 || len(after.Roles[0].Keys) != 3 || after.Roles[0].Keys[0].File != "" || len(after.Pending) != 0 {
		t.Errorf("after the ceremony: %+v", after)
	}
	if done, _ := filepath.Glob(filepath.Join(dir, "ceremonies", "*-rotate-root.json")); len(done) != 1 {
		t.Errorf("record %q", done)
	}

	// The old root keys are still in keys/, and sign nothing any more.
	if said := mustRun(t, "", "--dir", dir, "keys", "renew", "root"); !strings.Contains(said, "0 of 2 signatures") {
		t.Error(said)
	}
	if ics := mustRun(t, "", "--dir", dir, "keys", "list", "--ics"); !strings.HasPrefix(ics, "BEGIN:VCALENDAR\r\n") || strings.Count(ics, "BEGIN:VEVENT") != 6 {
		t.Errorf("calendar: %s", ics)
	}
}

// TestKeysInAToken builds the klatch-forge that speaks PKCS#11 and signs a
// ceremony with a key inside SoftHSM; the static one says what it lacks.
func TestKeysInAToken(t *testing.T) {
	h := softhsm.New(t)
	out, err := exec.Command("softhsm2-util", "--import", p256(t), "--token", h.Token, "--label", "anna", "--id", "01", "--pin", h.PIN).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	key := filepath.Join(t.TempDir(), "anna.key")
	uri := "pkcs11:token=klatch%20test;object=anna?module-path=" + h.Module + "&pin-source=file:" + h.PINFile + "\n"
	if err := os.WriteFile(key, []byte(uri), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "data")
	mustRun(t, "", "init", dir, "--profile", "lab", "--publisher", "example.org")
	mustRun(t, "", "--dir", dir, "keys", "role", "debian-12/amd64")
	if _, err := runForge(t, "", "--dir", dir, "keys", "add", "root", key); fault.CodeOf(err) != "no_pkcs11" {
		t.Errorf("the static program: %v", err)
	}
	program := filepath.Join(t.TempDir(), "klatch-forge")
	build := exec.Command("go", "build", "-tags", "pkcs11", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(program, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	run("--dir", dir, "keys", "add", "root", key, "--threshold", "2")
	pending := listKeys(t, dir).Pending
	if len(pending) != 1 {
		t.Fatalf("pending %q", pending)
	}
	run("keys", "sign", pending[0], "--key", key, "--yes")
	if said := run("--dir", dir, "keys", "complete", pending[0]); !strings.Contains(said, "in force      root 2") {
		t.Error(said)
	}
}

// p256 is a key file for softhsm2-util.
func p256(t *testing.T) string {
	t.Helper()
	b, err := keyfile.NewECDSA()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "p256.pem")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestCertificateForFirmware: in the form that mokutil and firmware read, and
// with the fingerprints that people compare.
func TestCertificateForFirmware(t *testing.T) {
	testkit.Need(t, "openssl")
	dir, der := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "module.der")
	mustRun(t, "", "init", dir, "--profile", "lab", "--publisher", "example.org")
	said := mustRun(t, "", "--dir", dir, "keys", "certificate", der)
	for _, digest := range []string{"sha1", "sha256"} {
		out, err := exec.Command("openssl", "x509", "-inform", "DER", "-in", der, "-noout", "-fingerprint", "-"+digest).CombinedOutput()
		_, fingerprint, ok := strings.Cut(strings.ToLower(strings.TrimSpace(string(out))), "=")
		if err != nil || !ok || !strings.Contains(said, fingerprint) {
			t.Errorf("openssl: %v, %s; klatch-forge:\n%s", err, out, said)
		}
	}
	if _, err := runForge(t, "", "--dir", dir, "keys", "certificate", der); fault.CodeOf(err) != "file_exists" {
		t.Errorf("over a file that exists: %v", err)
	}
	if again := mustRun(t, "", "--dir", dir, "keys", "certificate"); !strings.HasPrefix(said, again) || again == "" {
		t.Errorf("without a file:\n%s", again)
	}
}
