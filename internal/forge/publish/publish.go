// SPDX-License-Identifier: Apache-2.0

// Package publish puts signed livepatches into the publisher's TUF repository:
// a folder of static files that servers, mirrors and any web server can hand
// out. What is published is in the transparency log before, if the publisher
// keeps one (package publog). Livepatches go in first, the metadata that names
// them last, so a run that dies leaves a repository that clients accept, and
// the next run completes it.
package publish

import (
	"context"
	"encoding/json"
	"net/http"
	"path"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/publog"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/tufrepo"
)

// Publish adds all signed livepatches of the builds with their evidence, the
// policy that the evidence is checked by, and what machines are told of their
// kernel builds; or finds them published.
func Publish(ctx context.Context, d datadir.Dir, builds []build.Result, now time.Time) (tufrepo.Result, error) {
	var p tufrepo.Publication
	recalls, err := Recalls(d)
	if err != nil {
		return tufrepo.Result{}, err
	}
	for _, b := range builds {
		if recalls.Check(b.BuildID, b.Sequence) != nil {
			continue
		}
		t, err := target(d, b)
		if err != nil {
			return tufrepo.Result{}, err
		}
		e, err := evidenceTarget(b, t.Path)
		if fault.CodeOf(err) == "no_evidence" && tufrepo.Has(d.Repository(), t) {
			p.Targets = append(p.Targets, t) // published before there was evidence; it stays, and is logged
			continue
		}
		if err != nil {
			return tufrepo.Result{}, err
		}
		p.Targets = append(p.Targets, e, t)
	}
	if err := addNotices(d, builds, now, &p); err != nil {
		return tufrepo.Result{}, err
	}
	if len(builds)+len(p.Targets)+len(p.Withdraw) == 0 {
		return tufrepo.Result{}, fault.New(fault.Invalid, "nothing_signed", "no signed livepatch to publish").
			WithHint("klatch-forge sign --kernel RELEASE")
	}
	if len(builds) > 0 {
		policy, err := policyTarget(d)
		if err != nil {
			return tufrepo.Result{}, err
		}
		p.Targets = append(p.Targets, policy)
	}
	if err := releaseRoles(d, &p); err != nil {
		return tufrepo.Result{}, err
	}
	keys, err := sign.RepositoryKeys(d, sign.All)
	if err != nil {
		return tufrepo.Result{}, err
	}
	if p, err = logged(ctx, d, p); err != nil {
		return tufrepo.Result{}, err
	}
	return tufrepo.Publish(ctx, d.Repository(), p, keys, now)
}

func policyTarget(d datadir.Dir) (tufrepo.Target, error) {
	policy, err := attest.ReadPolicy(d)
	if err != nil {
		return tufrepo.Target{}, err
	}
	content, err := policy.Encode()
	if err != nil {
		return tufrepo.Target{}, err
	}
	t := tufrepo.Target{Path: policy.TargetPath(), Content: content}
	there, err := filepath.Glob(filepath.Join(d.Repository(), "targets", "policy", "*."+path.Base(t.Path)))
	if err == nil && len(there) > 0 && !tufrepo.Has(d.Repository(), t) {
		err = fault.New(fault.Conflict, "policy_published", "evidence policy %d is published with other content", policy.Version).
			WithHint("raise version in evidence.toml: a published file never changes")
	}
	return t, err
}

func evidenceTarget(b build.Result, bundle string) (tufrepo.Target, error) {
	f, err := attest.ReadFile(filepath.Dir(b.Module.Path))
	if err != nil {
		return tufrepo.Target{}, err
	}
	content, err := f.Encode()
	name, _ := evidence.TargetPath(bundle)
	return tufrepo.Target{Path: name, Content: content}, err
}

// logged puts every file of a publication into the transparency log and adds
// the proofs of the bundles. Nothing is published that is not logged; a
// publisher whose anchor has no log policy keeps no log.
func logged(ctx context.Context, d datadir.Dir, p tufrepo.Publication) (tufrepo.Publication, error) {
	l, err := publog.Open(d)
	if l == nil || err != nil {
		return p, err
	}
	return l.Add(ctx, p, livepatch.BundleSuffix, &http.Client{})
}

func target(d datadir.Dir, b build.Result) (tufrepo.Target, error) {
	var t tufrepo.Target
	content, err := durable.ReadFile(sign.BundleFile(d, b), livepatch.MaxBundle)
	if err != nil {
		return t, err
	}
	bundle, err := livepatch.ParseBundle(content)
	if err != nil {
		return t, err
	}
	raw, err := durable.ReadFile(d.Anchor(), trust.MaxAnchor)
	if err != nil {
		return t, err
	}
	anchor, err := trust.ParseAnchor(raw, true)
	if err != nil {
		return t, err
	}
	m, err := anchor.OpenManifest(bundle.Manifest)
	if err != nil {
		return t, err
	}
	listed := livepatch.Listed{Format: livepatch.ListedFormat, Kernel: m.Kernel, Sequence: m.Sequence, Fixes: m.Fixes}
	// When it passed the gate is the same each time, so repeating a
	// publication changes nothing. A build of before there was evidence has none.
	if f, err := attest.ReadFile(filepath.Dir(b.Module.Path)); err == nil {
		listed.Released = f.Signed
	}
	c, err := json.Marshal(listed)
	if err != nil {
		return t, err
	}
	return tufrepo.Target{Path: m.TargetPath(), Content: content, Custom: c}, nil
}

// Refresh signs again what is about to expire.
func Refresh(ctx context.Context, d datadir.Dir, now time.Time) (tufrepo.Result, error) {
	keys, err := sign.RepositoryKeys(d, sign.Unattended)
	if err != nil {
		return tufrepo.Result{}, err
	}
	return tufrepo.Refresh(ctx, d.Repository(), keys, now)
}
