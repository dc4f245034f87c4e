// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/livepatch"
)

// fileName is the evidence file beside a signed livepatch.
const fileName = "evidence.json"

// Gate decides whether a build may be signed, by the statements beside it and
// the policy of the data folder. earlier are the sequences that machines may
// have. It returns the evidence file to publish.
//
// A livepatch that passed before keeps its file while the statements stay the
// same: it may be published, and a published file never changes.
func Gate(d datadir.Dir, b build.Result, earlier []livepatch.Sequence, now time.Time) (evidence.File, evidence.Report, error) {
	var none evidence.File
	policy, err := ReadPolicy(d)
	if err != nil {
		return none, evidence.Report{}, err
	}
	dir := filepath.Dir(b.Module.Path)
	statements, err := Statements(dir)
	if err != nil {
		return none, evidence.Report{}, err
	}
	if statements, err = reviewInLab(d, policy, b, statements, now); err != nil {
		return none, evidence.Report{}, err
	}
	f := evidence.File{Format: evidence.FileFormat, About: About(b), Signed: evidence.At(now), Statements: statements}
	if old, err := ReadFile(dir); err == nil && old.About == f.About && sameStatements(old.Statements, f.Statements) {
		f.Signed = old.Signed
	}
	report, err := evidence.Check(policy, Facts(f, earlier, now, nil), f.Statements)
	return f, report, err
}

// Facts are those of an evidence file.
func Facts(f evidence.File, earlier []livepatch.Sequence, now time.Time, m *livepatch.Manifest) evidence.Facts {
	return evidence.Facts{About: f.About, Signed: f.Signed, Now: now, Earlier: earlier, Manifest: m}
}

// reviewInLab makes the review that a lab has nobody for, with its one key.
// The report says so.
func reviewInLab(d datadir.Dir, p evidence.Policy, b build.Result, have []evidence.Envelope, now time.Time) ([]evidence.Envelope, error) {
	if !p.SelfReview || slices.ContainsFunc(have, func(e evidence.Envelope) bool {
		s, err := evidence.Open(e, p)
		return err == nil && s.Role == evidence.Reviewer
	}) {
		return have, nil
	}
	dir := filepath.Dir(b.Module.Path)
	_, plan, err := build.Load(dir)
	if err != nil {
		return nil, err
	}
	k, err := Key(d, evidence.Reviewer, "")
	if err != nil {
		return nil, err
	}
	e, err := Review(k, b, plan, evidence.Approved, "made by klatch-forge sign: nobody looked", now)
	if err != nil {
		return nil, err
	}
	if _, err := Put(dir, evidence.Reviewer, k.Name, e); err != nil {
		return nil, err
	}
	return Statements(dir)
}

func sameStatements(a, b []evidence.Envelope) bool {
	return slices.EqualFunc(a, b, func(x, y evidence.Envelope) bool {
		p, err := x.Encode()
		q, err2 := y.Encode()
		return err == nil && err2 == nil && slices.Equal(p, q)
	})
}

// ReadFile reads the evidence file beside a signed livepatch.
func ReadFile(buildDir string) (evidence.File, error) {
	b, err := durable.ReadFile(filepath.Join(buildDir, fileName), evidence.MaxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return evidence.File{}, evidence.Refuse("no_evidence", "no evidence lies in %s: %w", buildDir, err)
	}
	if err != nil {
		return evidence.File{}, err
	}
	return evidence.ParseFile(b)
}

// WriteFile writes the evidence file beside a signed livepatch.
func WriteFile(buildDir string, f evidence.File) error {
	b, err := f.Encode()
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(buildDir, fileName), b, 0o644)
}
