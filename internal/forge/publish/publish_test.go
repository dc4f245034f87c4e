// SPDX-License-Identifier: Apache-2.0

package publish_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func folder(t *testing.T, p trust.Profile) datadir.Dir {
	t.Helper()
	d, err := datadir.Make(t.TempDir(), datadir.Policy{Publisher: "example.org", Profile: p})
	if err != nil {
		t.Fatal(err)
	}
	if err := sign.MakeKeys(t.Context(), d, now); err != nil {
		t.Fatal(err)
	}
	return d
}

// builtAndTested puts a build of any bytes into the folder, with its test.
func builtAndTested(t *testing.T, d datadir.Dir, seq livepatch.Sequence) build.Result {
	t.Helper()
	b := build.Result{Version: 1, Result: build.Built, Kernel: "6.1.0-50-cloud-amd64", Distro: "debian-12", Arch: "amd64",
		BuildID: [20]byte{7}, Sequence: seq, Fixes: []cve.ID{"CVE-2026-0001"}, Functions: []livepatch.Function{{Object: "vmlinux", Name: "f"}}}
	dir := build.Dir(d.Path, b.Kernel, seq)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	module := bytes.Repeat([]byte{byte(seq)}, 1000)
	sum := sha256.Sum256(module)
	b.Module = &build.Module{Path: filepath.Join(dir, seq.ModuleName()+".ko"), Bytes: 1000, SHA256: hex.EncodeToString(sum[:])}
	if err := os.WriteFile(b.Module.Path, module, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := proof.Keep(dir, proof.Result{Version: proof.ResultVersion, Verdict: lab.Pass, Sequence: seq,
		Required: []string{"load-and-disable"}, Scenarios: []proof.Scenario{{Name: "load-and-disable", Verdict: lab.Pass, Required: true}},
		ModuleSHA256: b.Module.SHA256,
		BuildID:      b.BuildID.String(), Fixes: []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Passed}}}); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSignedAndPublishedIsWhatAMachineReads(t *testing.T) {
	for _, profile := range []trust.Profile{trust.Lab, trust.Small} {
		t.Run(string(profile), func(t *testing.T) {
			d := folder(t, profile)
			var builds []build.Result
			for seq := livepatch.Sequence(1); seq <= 2; seq++ {
				b := builtAndTested(t, d, seq)
				if _, err := sign.Sign(d, b); err != nil {
					t.Fatal(err)
				}
				builds = append(builds, b)
			}
			if _, err := publish.Publish(t.Context(), d, builds, now); err != nil {
				t.Fatal(err)
			}
			again, err := publish.Publish(t.Context(), d, builds, now)
			if err != nil || again.Changed {
				t.Errorf("publishing the same again: changed %v, %v", again.Changed, err)
			}

			raw, err := os.ReadFile(d.Anchor())
			if err != nil {
				t.Fatal(err)
			}
			anchor, err := trust.ParseAnchor(raw, true)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := trust.ParseAnchor(raw, false); (err == nil) != (profile == trust.Small) {
				t.Errorf("profile %s without leave for lab keys: %v", profile, err)
			}
			base, client, err := tufclient.Source(d.Repository(), nil)
			if err != nil {
				t.Fatal(err)
			}
			snap, err := tufclient.Refresh(t.Context(), tufclient.Config{Root: anchor.Root, Dir: t.TempDir(), BaseURL: base,
				Client: client, Now: now})
			if err != nil {
				t.Fatal(err)
			}
			if n := len(snap.Targets()); n != 2 {
				t.Fatalf("%d targets", n)
			}
			for _, target := range snap.Targets() {
				content, err := snap.Download(t.Context(), target, livepatch.MaxBundle)
				if err != nil {
					t.Fatal(err)
				}
				bundle, err := livepatch.ParseBundle(content)
				if err != nil {
					t.Fatal(err)
				}
				m, err := anchor.OpenManifest(bundle.Manifest)
				if err != nil || m.TargetPath() != target.Path || m.Fixes[0].Check != livepatch.Passed {
					t.Errorf("manifest %+v, %v", m, err)
				}
				if _, err := anchor.VerifyModule(bundle.Module); err != nil {
					t.Error(err)
				}
				var custom struct {
					Sequence livepatch.Sequence `json:"sequence"`
				}
				if err := json.Unmarshal(target.Custom, &custom); err != nil || custom.Sequence != m.Sequence {
					t.Errorf("custom %s: %v", target.Custom, err)
				}
			}
		})
	}
}

func TestSigningRefusesWhatIsNotProved(t *testing.T) {
	d := folder(t, trust.Lab)
	b := builtAndTested(t, d, 1)
	result := filepath.Join(filepath.Dir(b.Module.Path), "test.json")
	good, err := os.ReadFile(result)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(result); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Sign(d, b); fault.CodeOf(err) != "not_tested" {
		t.Errorf("untested: %v", err)
	}
	if err := os.WriteFile(result, bytes.Replace(good, []byte(`"pass"`), []byte(`"broken"`), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Sign(d, b); fault.CodeOf(err) != "test_failed" {
		t.Errorf("a broken lab: %v", err)
	}
	if err := os.WriteFile(result, good, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.Module.Path, []byte("other bytes"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Sign(d, b); fault.CodeOf(err) != "module_digest" {
		t.Errorf("other bytes than were built: %v", err)
	}
	if _, err := os.Stat(sign.BundleFile(d, b)); err == nil {
		t.Error("a bundle was written")
	}
	if _, err := publish.Publish(t.Context(), d, nil, now); fault.CodeOf(err) != "nothing_signed" {
		t.Errorf("nothing to publish: %v", err)
	}
}

func TestSigningTwiceGivesTheSameBundle(t *testing.T) {
	d := folder(t, trust.Lab)
	b := builtAndTested(t, d, 1)
	var bundles [2][]byte
	for i := range bundles {
		if _, err := sign.Sign(d, b); err != nil {
			t.Fatal(err)
		}
		var err error
		if bundles[i], err = os.ReadFile(sign.BundleFile(d, b)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(bundles[0], bundles[1]) {
		t.Error("the bundles differ")
	}
}

// TestKeysAreMadeOnceAndPrivate: a second run, as after a crash, keeps them.
func TestKeysAreMadeOnceAndPrivate(t *testing.T) {
	d := folder(t, trust.Small)
	read := func() map[string]string {
		all := map[string]string{}
		files, err := filepath.Glob(filepath.Join(d.Keys(), "*"))
		if err != nil || len(files) != 3+2+1+1+2+1 {
			t.Fatalf("%d key files, %v", len(files), err)
		}
		for _, f := range append(files, d.Anchor()) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all[f] = string(b)
			if st, err := os.Stat(f); err != nil || f != d.Anchor() && st.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v, %v", f, st.Mode(), err)
			}
		}
		return all
	}
	before := read()
	if err := os.Remove(d.Anchor()); err != nil { // the run died before its last step
		t.Fatal(err)
	}
	if err := sign.MakeKeys(t.Context(), d, now); err != nil {
		t.Fatal(err)
	}
	for f, content := range read() {
		if before[f] != content {
			t.Errorf("%s was made again", f)
		}
	}
	if _, err := datadir.Make(d.Path, datadir.Policy{Publisher: "other.org", Profile: trust.Small}); fault.CodeOf(err) != "policy_exists" {
		t.Errorf("another publisher in the same folder: %v", err)
	}
}
