// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"

	"klatch/internal/evidence"
	"klatch/internal/fault"
)

// EvidenceRule says of which publishers this machine asks evidence beside
// their livepatches.
type EvidenceRule string

// The rules. Nothing turns the check off where a policy is published.
const (
	// EvidencePublished asks it of those that publish a policy, and of those
	// that ever did.
	EvidencePublished EvidenceRule = "published"
	// EvidenceRequired refuses the livepatches of a publisher without one.
	EvidenceRequired EvidenceRule = "required"
)

// codeEvidenceBack: the policy that was followed here is gone.
const codeEvidenceBack fault.Code = "evidence_rollback"

// evidenceSeen is the newest evidence policy that was followed here, of the
// publisher of one anchor.
type evidenceSeen struct {
	Basis   string `json:"basis"`
	Version int    `json:"version"`
}

// checkEvidence asks the statements that lie beside a livepatch: who built it,
// how it was tested, who reviewed it, by the newest policy that the targets
// keys signed. It is the check that the publisher's gate and a stranger make.
func (t *trial) checkEvidence(ctx context.Context) error {
	target := t.snapshot.EvidencePolicy()
	if err := t.checkPolicySeen(evidence.PolicyVersion(target)); err != nil {
		return err
	}
	if target == "" {
		if t.cfg.Evidence == EvidenceRequired {
			return stays(fault.New(fault.Untrusted, "no_policy", "the publisher has no evidence policy, and this machine asks for evidence").
				WithHint("ask the publisher to publish evidence, or take evidence = \"required\" out of this machine's settings"))
		}
		return nil
	}
	content, err := t.snapshot.Fetch(ctx, target, evidence.MaxPolicy)
	if err != nil {
		return stays(err)
	}
	policy, err := evidence.OpenPolicy(target, content, t.anchor.Profile)
	if err != nil {
		return stays(forMachines(err))
	}
	path, _ := evidence.TargetPath(t.offer.Target)
	file, err := t.snapshot.Fetch(ctx, path, evidence.MaxFile)
	if fault.KindOf(err) == fault.NotFound {
		return forMachines(evidence.Refuse("no_evidence", "no evidence lies beside %.200s", t.offer.Target))
	}
	if err != nil {
		return stays(err)
	}
	module, err := t.anchor.VerifyModule(t.bundle.Module)
	if err != nil {
		return err
	}
	if _, _, err := evidence.Judge(policy, evidence.Published{
		Manifest: t.manifest, Module: module, File: file, Targets: t.snapshot.Beside(t.offer.Target), Now: t.start,
	}); err != nil {
		return forMachines(err)
	}
	return t.sawPolicy(policy.Version)
}

// forMachines puts a next step for this machine's owner in the place of the
// publisher's own.
func forMachines(err error) error {
	return fault.New(fault.KindOf(err), fault.CodeOf(err), "evidence: %w", err).
		WithHint("tell the publisher this code; nothing is to be done here, and what is loaded stays (docs/reference/evidence.md)")
}

// checkPolicySeen keeps the policy from going back: an older one may name a
// key that was taken out since.
func (t *trial) checkPolicySeen(version int) error {
	seen := t.journal().Evidence
	if seen == nil || seen.Basis != t.basis || version >= seen.Version {
		return nil
	}
	return stays(fault.New(fault.Untrusted, codeEvidenceBack, "the signed list has evidence policy %d; policy %d was followed here before", version, seen.Version).
		WithHint("ask the publisher, by another way than the server, why its evidence policy was taken back"))
}

// sawPolicy is on disk before anything is staged by it.
func (t *trial) sawPolicy(version int) error {
	seen := evidenceSeen{t.basis, version}
	if old := t.journal().Evidence; old != nil && *old == seen {
		return nil
	}
	return t.update(func(j *journal) { j.Evidence = &seen })
}

// evidenceDigest names what the check will read, by the signed list.
func (t *trial) evidenceDigest(policy string) (string, error) {
	path, _ := evidence.TargetPath(t.offer.Target)
	by, err := t.snapshot.Named(policy)
	if err != nil {
		return "", err
	}
	file, err := t.snapshot.Named(path)
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return "", err
	}
	return digestOf([]byte(by.SHA256 + " " + file.SHA256)), nil
}
