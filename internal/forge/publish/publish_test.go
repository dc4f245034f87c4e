// SPDX-License-Identifier: Apache-2.0

package publish_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/evidencesim"
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
	if p == trust.Lab {
		return d
	}
	bob, err := attest.MakeKey(d, evidencesim.Bob, evidence.Reviewer)
	if err != nil {
		t.Fatal(err)
	}
	signer := bob.Signer()
	signer.Also = []string{"robert@example.org"}
	if _, err := attest.Allow(d, signer); err != nil {
		t.Fatal(err)
	}
	return d
}

// built puts a build of any bytes into the folder, with all its evidence.
func built(t *testing.T, d datadir.Dir, seq livepatch.Sequence) build.Result {
	t.Helper()
	b, plan, err := evidencesim.Built(d, seq)
	if err != nil {
		t.Fatal(err)
	}
	if err := evidencesim.Attested(d, b, plan, now); err != nil {
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
				b := built(t, d, seq)
				res, err := sign.Sign(d, b, now)
				if err != nil {
					t.Fatal(err)
				}
				if notes := strings.Join(res.Evidence.Notes, "\n"); !strings.Contains(notes, "one builder only") || strings.Contains(notes, "LAB") != (profile == trust.Lab) ||
					strings.Contains(notes, "nobody showed that CVE-2026-0002 is fixed") != (seq == 2) {
					t.Errorf("profile %s says %q", profile, notes)
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
			if n := len(snap.Targets()); n != 5 { // the policy, and evidence beside each
				t.Fatalf("%d targets", n)
			}
			for _, target := range snap.Targets() {
				if !strings.HasSuffix(target.Path, ".lpb") {
					continue
				}
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
				listed, ok := livepatch.ParseListed(target.Custom)
				if !ok || listed.Sequence != m.Sequence || !listed.Released.Equal(now) {
					t.Errorf("the list says %s", target.Custom)
				}
			}
		})
	}
}

func TestSigningRefusesWhatIsNotProved(t *testing.T) {
	d := folder(t, trust.Lab)
	b := built(t, d, 1)
	tester, err := attest.Key(d, evidence.Tester, "")
	if err != nil {
		t.Fatal(err)
	}
	result := filepath.Join(filepath.Dir(b.Module.Path), "evidence", "tester-lab.json")
	if err := os.Remove(result); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Sign(d, b, now); fault.CodeOf(err) != "not_tested" {
		t.Errorf("untested: %v", err)
	}
	for name, change := range map[string]func(*proof.Result){
		"a broken lab": func(r *proof.Result) { r.Verdict, r.Scenarios[1].Verdict = lab.Broken, lab.Broken },
		"a fail":       func(r *proof.Result) { r.Verdict, r.Scenarios[1].Verdict = lab.Fail, lab.Fail },
		"no boot":      func(r *proof.Result) { r.Verdict, r.Scenarios = lab.Broken, nil },
	} {
		r := evidencesim.Tested(b)
		change(&r)
		e, err := attest.Test(tester, b, r, now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attest.Put(filepath.Dir(b.Module.Path), evidence.Tester, tester.Name, e); err != nil {
			t.Fatal(err)
		}
		if _, err := sign.Sign(d, b, now); fault.CodeOf(err) != "test_failed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(b.Module.Path, []byte("other bytes"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Sign(d, b, now); fault.CodeOf(err) != "module_digest" {
		t.Errorf("other bytes than were built: %v", err)
	}
	if _, err := os.Stat(sign.BundleFile(d, b)); err == nil {
		t.Error("a bundle was written")
	}
	if _, err := publish.Publish(t.Context(), d, nil, now); fault.CodeOf(err) != "nothing_signed" {
		t.Errorf("nothing to publish: %v", err)
	}
}

// TestSigningTwiceGivesTheSameFiles: the evidence keeps the time at which it
// first sufficed, because it may be published.
func TestSigningTwiceGivesTheSameFiles(t *testing.T) {
	d := folder(t, trust.Lab)
	b := built(t, d, 1)
	var files [2]string
	for i := range files {
		if _, err := sign.Sign(d, b, now.Add(time.Duration(i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
		bundle, err := os.ReadFile(sign.BundleFile(d, b))
		if err != nil {
			t.Fatal(err)
		}
		beside, err := os.ReadFile(filepath.Join(filepath.Dir(b.Module.Path), "evidence.json"))
		if err != nil {
			t.Fatal(err)
		}
		files[i] = string(bundle) + string(beside)
	}
	if files[0] != files[1] {
		t.Error("the files differ")
	}
}

// TestWhatWasPublishedBeforeEvidenceStays: a bundle in the repository without
// evidence is no reason to stop publishing; a new one without it is refused.
func TestWhatWasPublishedBeforeEvidenceStays(t *testing.T) {
	d := folder(t, trust.Lab)
	one := built(t, d, 1)
	if _, err := sign.Sign(d, one, now); err != nil {
		t.Fatal(err)
	}
	beside := filepath.Join(filepath.Dir(one.Module.Path), "evidence.json")
	if err := os.Rename(beside, beside+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{one}, now); fault.CodeOf(err) != "no_evidence" {
		t.Errorf("a new livepatch without evidence: %v", err)
	}
	if err := os.Rename(beside+".away", beside); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{one}, now); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(beside); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{one}, now); err != nil {
		t.Errorf("a published livepatch without evidence: %v", err)
	}
}

// TestAPublishedPolicyNeverChanges: another text needs another version.
func TestAPublishedPolicyNeverChanges(t *testing.T) {
	d := folder(t, trust.Lab)
	b := built(t, d, 1)
	if _, err := sign.Sign(d, b, now); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{b}, now); err != nil {
		t.Fatal(err)
	}
	p, err := attest.ReadPolicy(d)
	if err != nil {
		t.Fatal(err)
	}
	p.TestDays = 3
	if err := attest.WritePolicy(d, p); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{b}, now); fault.CodeOf(err) != "policy_published" {
		t.Errorf("another policy of the same version: %v", err)
	}
	p.Version++
	if err := attest.WritePolicy(d, p); err != nil {
		t.Fatal(err)
	}
	if res, err := publish.Publish(t.Context(), d, []build.Result{b}, now); err != nil || !res.Changed {
		t.Errorf("a newer policy: %+v, %v", res, err)
	}
}

// TestKeysAreMadeOnceAndPrivate: a second run, as after a crash, keeps them.
func TestKeysAreMadeOnceAndPrivate(t *testing.T) {
	d := folder(t, trust.Small)
	read := func() map[string]string {
		all := map[string]string{}
		files, err := filepath.Glob(filepath.Join(d.Keys(), "*"))
		if err != nil || len(files) != 3+2+1+1+2+1+4 { // four of evidence
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
