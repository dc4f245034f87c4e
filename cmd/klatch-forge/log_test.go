// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/forge/datadir"
	"klatch/internal/forge/publog"
	"klatch/internal/forge/sign"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// ran runs the program and wants that exit status; it returns all it says.
func ran(t *testing.T, exit int, args ...string) string {
	t.Helper()
	stdout, stderr, got := program(t, args...)
	if got != exit {
		t.Fatalf("klatch-forge %s: exit %d, want %d\n%s%s", strings.Join(args, " "), got, exit, stdout, stderr)
	}
	return stdout + stderr
}

// startWitness runs "log witness serve" and returns its address.
func startWitness(t *testing.T, dir, log string) (url string, stop func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "log", "witness", "serve", dir, "--listen", "127.0.0.1:0", "--log", log)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	t.Cleanup(stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	address, found := strings.CutPrefix(strings.TrimSpace(line), "ready ")
	if err != nil || !found {
		t.Fatalf("line %q, %v", line, err)
	}
	return "http://" + address, stop
}

// TestALogWithWitnessesByTheRealPrograms: a publisher of profile small, two
// witness processes of which one must cosign; publish, show, verify, audit;
// then a witness is away, a file is changed, the log goes back.
func TestALogWithWitnessesByTheRealPrograms(t *testing.T) {
	dir := t.TempDir()
	data, kept := filepath.Join(dir, "data"), filepath.Join(dir, "kept")
	if out := ran(t, 0, "init", data, "--profile", "small", "--publisher", "example.org"); !strings.Contains(out, "log init") {
		t.Errorf("init says nothing of the log:\n%s", out)
	}
	ran(t, 2, "--dir", data, "log", "init") // makes the key, and asks for witnesses
	d, err := datadir.Open(data)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := os.ReadFile(publog.KeyFile(d))
	if err != nil {
		t.Fatal(err)
	}
	s, err := translog.ParseSecret(string(secret))
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"--dir", data, "log", "init", "--need", "1"}
	var stops []func()
	for _, name := range []string{"w1.example", "w2.example"} {
		folder := filepath.Join(dir, name)
		key := strings.TrimSpace(ran(t, 0, "log", "witness", "init", folder, "--name", name))
		if again := strings.TrimSpace(ran(t, 0, "log", "witness", "init", folder, "--name", name)); again != key {
			t.Errorf("a second key %s", again)
		}
		url, stop := startWitness(t, folder, s.Log().String())
		args, stops = append(args, "--witness", key+" "+url), append(stops, stop)
	}
	ran(t, 0, args...)

	one := publishLogged(t, d, 1)
	ran(t, 0, "--dir", data, "log", "audit", "--kept", kept)
	publishLogged(t, d, 2)
	if out := ran(t, 0, "--dir", data, "log", "audit", "--kept", kept); !strings.Contains(out, "continues the kept checkpoint of 1 entries") ||
		!strings.Contains(out, "cosigned by w1.example, w2.example") || !strings.Contains(out, "proof that holds 2") {
		t.Errorf("audit\n%s", out)
	}
	// The same by the network, as somebody who has nothing but the anchor.
	web := httptest.NewServer(http.FileServer(http.Dir(d.Repository())))
	defer web.Close()
	if out := ran(t, 0, "log", "audit", "--anchor", d.Anchor(), "--from", web.URL, "--kept", kept); !strings.Contains(out, "proof that holds 2") {
		t.Errorf("audit by the network\n%s", out)
	}
	if out := ran(t, 0, "--dir", data, "log", "show"); !strings.Contains(out, s.Log().String()) || !strings.Contains(out, "klatch_2.lpb") {
		t.Errorf("show\n%s", out)
	}

	// Offline: bundle, proof and anchor in a folder of their own.
	file := filepath.Join(dir, "klatch_1.lpb")
	proof, err := tufrepo.Open(d.Repository())
	if err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{file: one, translog.ProofPath(file): translog.ProofPath(one)} {
		b, err := proof.Read(target, livepatch.MaxBundle)
		if err == nil {
			err = os.WriteFile(name, b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if out := ran(t, 0, "log", "verify", "--anchor", d.Anchor(), file); !strings.Contains(out, one) {
		t.Errorf("verify\n%s", out)
	}
	if err := os.Remove(translog.ProofPath(file)); err != nil {
		t.Fatal(err)
	}
	if out := ran(t, 3, "log", "verify", "--anchor", d.Anchor(), file); !strings.Contains(out, "log_no_proof") {
		t.Errorf("verify without a proof\n%s", out)
	}

	stops[0]()
	publishLogged(t, d, 3) // one is enough
	tile := filepath.Join(d.Repository(), translog.Folder(s.Log()), "tile/entries/000.p/3")
	b, err := os.ReadFile(tile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tile, bytes.Replace(b, []byte("klatch_2"), []byte("klatch_9"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := ran(t, 3, "--dir", data, "log", "audit", "--kept", kept); !strings.Contains(out, "log_tiles") {
		t.Errorf("audit of a changed entry\n%s", out)
	}
	if out := ran(t, 3, "log", "audit", "--anchor", d.Anchor(), "--from", web.URL, "--kept", kept); !strings.Contains(out, "log_tiles") {
		t.Errorf("audit of a changed entry by the network\n%s", out)
	}
}

// publishLogged signs a livepatch with the folder's keys, logs and publishes
// it.
func publishLogged(t *testing.T, d datadir.Dir, seq livepatch.Sequence) string {
	t.Helper()
	module := fmt.Appendf(nil, "module %d", seq)
	short, long := sha256.Sum256(module), sha512.Sum512(module)
	m := livepatch.Manifest{Format: livepatch.ManifestFormat, Sequence: seq,
		Kernel: kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{1}},
		Module: livepatch.Module{Name: seq.ModuleName(), Bytes: int64(len(module)), SHA256: hex.EncodeToString(short[:]), SHA512: hex.EncodeToString(long[:])},
		Fixes:  []livepatch.Fix{}, Functions: []livepatch.Function{{Object: "vmlinux", Name: "f"}}}
	var signers []note.Signer
	for i := range 2 {
		b, err := os.ReadFile(filepath.Join(d.Keys(), fmt.Sprintf("manifest-%d.key", i+1)))
		if err != nil {
			t.Fatal(err)
		}
		s, err := note.NewSigner(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		signers = append(signers, s)
	}
	manifest, err := trustsign.Manifest(m, signers...)
	if err != nil {
		t.Fatal(err)
	}
	p := tufrepo.Publication{Targets: []tufrepo.Target{{Path: m.TargetPath(), Content: livepatch.Bundle{Manifest: manifest, Module: module}.Encode()}}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l, err := publog.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	if p, err = l.Add(ctx, p, livepatch.BundleSuffix, &http.Client{}); err != nil {
		t.Fatal(err)
	}
	keys, err := sign.RepositoryKeys(d, sign.All)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tufrepo.Publish(ctx, d.Repository(), p, keys, time.Now()); err != nil {
		t.Fatal(err)
	}
	return m.TargetPath()
}
