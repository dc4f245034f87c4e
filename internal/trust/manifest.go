// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// OpenManifest verifies a signed manifest against the anchor's threshold and
// only then parses it. Signatures by unknown keys are ignored, as signed notes
// ask; a bad signature by a known key is an error.
func (a *Anchor) OpenManifest(signed []byte) (livepatch.Manifest, error) {
	return open(a, signed, livepatch.MaxManifest, livepatch.ParseManifest)
}

// OpenRecalls does the same with signed recalls.
func (a *Anchor) OpenRecalls(signed []byte) (livepatch.Recalls, error) {
	return open(a, signed, livepatch.MaxRecalls, livepatch.ParseRecalls)
}

func open[T any](a *Anchor, signed []byte, limit int, parse func([]byte) (T, error)) (none T, err error) {
	if len(signed) > limit {
		return none, fault.New(fault.Invalid, "manifest_malformed", "signed manifest has %d bytes, limit %d", len(signed), limit)
	}
	vs, err := a.Manifest.verifiers()
	if err != nil {
		return none, err
	}
	n, err := note.Open(signed, note.VerifierList(vs...))
	if _, unknown := errors.AsType[*note.UnverifiedNoteError](err); unknown {
		return none, fault.New(fault.Untrusted, "manifest_untrusted", "manifest is signed by no key of publisher %s%w", a.Publisher, livepatch.ErrForeign).
			WithHint("check that this machine has the anchor of the publisher whose repository it uses: klatch trust show")
	}
	if err != nil {
		return none, fault.New(fault.Untrusted, "manifest_untrusted", "manifest signature: %w", err)
	}
	keys := map[string]bool{}
	for _, s := range n.Sigs {
		keys[s.Name] = true
	}
	if len(keys) < a.Manifest.Threshold {
		return none, fault.New(fault.Untrusted, "manifest_threshold", "manifest has %d of %d signatures needed", len(keys), a.Manifest.Threshold)
	}
	return parse([]byte(n.Text))
}
