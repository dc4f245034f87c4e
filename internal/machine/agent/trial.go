// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/rollout"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

// trial is one look for something newer, from the first check to the last. Each
// check finds what those before it have verified, and adds its own. Nothing is
// staged unless all of them agree.
type trial struct {
	*Agent
	o     observation
	start time.Time // of the whole look
	// basis names the anchor by which all of this is judged.
	basis string

	anchor   *trust.Anchor // without the recalled keys, once these are known
	policy   *translog.Policy
	answer   wire.CheckAnswer
	snapshot Snapshot
	operator *rollout.Anchor // nil: the server chooses
	rollout  RolloutSnapshot
	recalls  livepatch.Recalls
	offer    wire.Offer
	digests  digests   // of the signed list
	until    time.Time // when the list expires that names it

	raw      []byte
	bundle   livepatch.Bundle
	manifest livepatch.Manifest
	proof    []byte

	reason    fault.Code // why it is offered
	noticeErr error
	// done ends the look before the last check: there is nothing to load.
	done *Check
}

// digests are those by which the signed list names the files that are judged.
type digests struct {
	Bundle string `json:"sha256"`
	Proof  string `json:"proof_sha256,omitempty"`
	// Evidence is of what lies beside it and of the policy, together.
	Evidence string `json:"evidence_sha256,omitempty"`
}

type check struct {
	step Step
	run  func(*trial, context.Context) error
}

// order is what klatchd checks, in this order; see Order.
func order() []check {
	return []check{
		{StepMemory, (*trial).know},
		{StepMemory, (*trial).checkRecord},
		{StepSelection, (*trial).ask},
		{StepClock, (*trial).checkClock},
		{StepRollout, (*trial).refreshRollout},
		{StepMetadata, (*trial).refresh},
		{StepPolicy, (*trial).takePolicy},
		{StepMemory, (*trial).checkHalt},
		{StepSelection, (*trial).choose},
		{StepForward, (*trial).checkForward},
		{StepDownload, (*trial).askKernel},
		{StepDownload, (*trial).download},
		{StepBundle, (*trial).openBundle},
		{StepKernel, (*trial).checkKernel},
		{StepModule, (*trial).checkModule},
		{StepLog, (*trial).checkLog},
		{StepEvidence, (*trial).checkEvidence},
	}
}

// look asks the server and goes through the order. It changes nothing unless
// every check agrees.
func (a *Agent) look(ctx context.Context, t *trial) (Check, error) {
	for _, c := range a.order {
		if err := c.run(t, ctx); err != nil {
			return Check{}, at(c.step, err)
		}
		if t.done != nil {
			break
		}
	}
	if t.done == nil {
		if err := a.stage(t); err != nil {
			return Check{}, err
		}
		t.done = &Check{Result: resultOffered, Code: t.reason}
	}
	return *t.done, t.noticeErr
}

// know finds out where this machine stands and whom it believes.
func (t *trial) know(context.Context) error {
	if t.o.FactsErr != nil {
		return t.o.FactsErr
	}
	var err error
	if t.anchor, t.policy, err = t.trusted(); err != nil {
		return err
	}
	t.basis = basisOf(t.anchor)
	if t.operator, err = t.operatorAnchor(); err != nil {
		return err
	}
	if t.o.Loader == nil {
		return t.o.LoaderErr // without its record we could stage what it must refuse
	}
	return nil
}

// checkRecord compares root's record with what was seen of it here.
func (t *trial) checkRecord(context.Context) error { return t.checkPeak(t.o) }

// ask tells the server how this machine is, and takes what it offers. Nothing of
// that is believed; it is asked first so that it hears of all refusals.
func (t *trial) ask(ctx context.Context) (err error) {
	t.answer, err = t.cfg.Server.Check(ctx, wire.CheckRequest{Facts: t.o.Facts, Sequence: t.o.loaded(), State: t.State()})
	return err
}

func (t *trial) checkClock(context.Context) error {
	return checkClock(t.start, floor(t.journal(), t.cfg.Built))
}

// refresh brings the publisher's metadata up to date.
func (t *trial) refresh(ctx context.Context) error {
	var err error
	if t.snapshot, err = t.cfg.Repository.Refresh(ctx, t.anchor, t.start); err != nil {
		if fault.CodeOf(err) == codeClock {
			return at(StepClock, err)
		}
		return err
	}
	v, signed := t.snapshot.Metadata()
	if err := t.raiseFloor(t.start, signed, "metadata"); err != nil {
		return err
	}
	return t.sawVersions(func(s *wire.Seen) { s.Patches = &v })
}

// takePolicy takes the recalls, and beside them the notice: a bad notice keeps
// nobody from a good livepatch, and is told all the same.
func (t *trial) takePolicy(ctx context.Context) error {
	var err error
	if t.recalls, err = t.takeRecalls(ctx, t.snapshot, t.anchor, t.o); err != nil {
		return err
	}
	if err := t.raiseFloor(t.start, t.recalls.Issued, "recalls"); err != nil {
		return err
	}
	if err := t.endHalt(t.inForce()); err != nil {
		return err
	}
	t.anchor = without(t.anchor, t.recalls)
	t.noticeErr = t.takeNotice(ctx, t.snapshot, t.o.Facts.Kernel)
	return nil
}

func (t *trial) inForce() inForce {
	p := inForce{Basis: t.basis, Recalls: t.recalls.Version}
	if t.rollout != nil {
		v, _ := t.rollout.Metadata()
		p.Rollout = v.Targets
	}
	return p
}

func (t *trial) checkHalt(context.Context) error {
	h, err := t.halted(t.policy)
	if err != nil || h == nil {
		return err
	}
	return t.haltError(h)
}

// checkForward keeps to what goes forward, and to what was not refused before.
func (t *trial) checkForward(context.Context) error {
	var err error
	if t.digests, err = t.signedDigests(); err != nil {
		return err
	}
	id, j := t.o.Facts.Kernel.ID, t.journal()
	if err := t.recalls.Check(id, t.offer.Sequence); err != nil {
		return untrusted(err)
	}
	if t.done = t.nothingToDo(j); t.done != nil {
		return nil
	}
	if err := livepatch.CheckReplace(t.o.floor(), t.offer.Sequence); err != nil {
		return untrusted(err)
	}
	if q, ok := j.inQuarantine(t.basis, id, t.offer.Target, t.digests); ok {
		return &refusal{q.Step, Quarantine, fault.New(fault.Untrusted, q.Code, "%s", q.Text).
			WithHint("it is not fetched again until its publisher offers another; klatch retry tries it again")}
	}
	return nil
}

// signedDigests reads the list. Where it does not name the target, that is
// found out when it is fetched.
func (t *trial) signedDigests() (digests, error) {
	var d digests
	named, err := t.snapshot.Named(t.offer.Target)
	t.until = named.Until
	if d.Bundle = named.SHA256; err == nil && t.policy != nil {
		named, err = t.snapshot.Named(translog.ProofPath(t.offer.Target))
		d.Proof = named.SHA256
	}
	if policy := t.snapshot.EvidencePolicy(); policy != "" && (err == nil || fault.KindOf(err) == fault.NotFound) {
		d.Evidence, err = t.evidenceDigest(policy)
	}
	if fault.KindOf(err) == fault.NotFound {
		return d, nil
	}
	return d, err
}

// nothingToDo is for an offer that is no fault of anybody.
func (t *trial) nothingToDo(j journal) *Check {
	if code, text := t.o.stopped(j); code != "" {
		return &Check{Result: resultCurrent, Code: code, Text: text}
	}
	if b, ok := j.isBlocked(t.o.Facts.Kernel.ID, t.offer.Sequence); ok && b.same(t.digests) {
		return &Check{Result: resultCurrent, Code: "blocked", Text: b.Text}
	}
	if t.offer.Sequence == t.o.highest() && t.o.loaded() == 0 {
		// Confirmed once and not in the kernel: putting it back is the
		// loader's own work, at boot.
		return &Check{Result: resultCurrent, Code: "loaded_at_boot_only"}
	}
	if j.Work != nil && j.Work.Sequence >= t.offer.Sequence {
		return &Check{Result: resultCurrent, Code: "staged"}
	}
	return t.ahead()
}

// untrusted makes a refusal out of a conflict: the server offered what it may
// never offer.
func untrusted(err error) error {
	return fault.New(fault.Untrusted, fault.CodeOf(err), "offer of the server: %w", err).
		WithHint("tell whoever runs the server: it offered what this machine must refuse")
}

func (t *trial) download(ctx context.Context) (err error) {
	t.raw, err = t.snapshot.Fetch(ctx, t.offer.Target, livepatch.MaxBundle)
	if fault.KindOf(err) == fault.NotFound {
		return untrusted(err)
	}
	return err
}

// openBundle verifies the manifest, which says what the bundle is.
func (t *trial) openBundle(context.Context) (err error) {
	if t.bundle, err = livepatch.ParseBundle(t.raw); err != nil {
		return err
	}
	t.manifest, err = t.anchor.OpenManifest(t.bundle.Manifest)
	return err
}

func (t *trial) checkKernel(context.Context) error {
	return meant(t.manifest, t.o.Facts.Kernel, t.offer)
}

// meant says whether a manifest is for the kernel that runs, and the one that
// was asked for.
func meant(m livepatch.Manifest, running kernel.Build, offer wire.Offer) error {
	if err := kernel.Fits(m.Kernel, running); err != nil {
		return err
	}
	if m.TargetPath() != offer.Target || m.Sequence != offer.Sequence {
		return fault.New(fault.Untrusted, "wrong_target", "target %.200q with sequence %d holds %q with sequence %d", offer.Target, offer.Sequence, m.TargetPath(), m.Sequence)
	}
	return nil
}

func (t *trial) checkModule(context.Context) error {
	return checkModule(t.manifest.Module, t.bundle.Module)
}

func checkModule(want livepatch.Module, module []byte) error {
	short, long := sha256.Sum256(module), sha512.Sum512(module)
	if int64(len(module)) != want.Bytes || hex.EncodeToString(short[:]) != want.SHA256 || hex.EncodeToString(long[:]) != want.SHA512 {
		return fault.New(fault.Untrusted, "module_digest", "module %s: its bytes are not those of the manifest", want.Name)
	}
	return nil
}

// basisOf names an anchor: what was refused by one may be good by another.
func basisOf(a *trust.Anchor) string {
	b, err := json.Marshal(a)
	if err != nil {
		return "" // it was read from JSON
	}
	return digestOf(b)
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
