// SPDX-License-Identifier: Apache-2.0

package trust

import (
	"errors"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// SignManifest encodes and signs a manifest. The signature is over the text
// itself, so a signer sees what it signs.
func SignManifest(m livepatch.Manifest, signers ...note.Signer) ([]byte, error) {
	text, err := m.Encode()
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: string(text)}, signers...)
}

// OpenManifest verifies a signed manifest against the anchor's threshold and
// only then parses it. Signatures by unknown keys are ignored, as signed notes
// ask; a bad signature by a known key is an error.
func (a *Anchor) OpenManifest(signed []byte) (livepatch.Manifest, error) {
	var none livepatch.Manifest
	if len(signed) > livepatch.MaxManifest {
		return none, fault.New(fault.Invalid, "manifest_malformed", "signed manifest has %d bytes, limit %d", len(signed), livepatch.MaxManifest)
	}
	vs, err := a.Manifest.verifiers()
	if err != nil {
		return none, err
	}
	n, err := note.Open(signed, note.VerifierList(vs...))
	if _, unknown := errors.AsType[*note.UnverifiedNoteError](err); unknown {
		return none, fault.New(fault.Untrusted, "manifest_untrusted", "manifest is signed by no key of publisher %s", a.Publisher).
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
	return livepatch.ParseManifest([]byte(n.Text))
}
